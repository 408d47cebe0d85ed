"""The sides of a kernel comparison: each implementation with the operands of one case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines import (
    dense_attention,
    dense_copies,
    exact_attention,
    pad_tables,
    paged_attention,
    pool_of_copies,
)
from experiments.kernel import Implementation
from jax_chunkattn.planner import PlannerOptions, PlanSummary, plan_decode
from jax_chunkattn.workloads import case_inputs
from pallas_kernels import DecodePlan, chunk_attention
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.implementations import AttentionShapes, ImplementationError, needs_partials
from pallas_kernels.specs import AttentionCase
from pallas_kernels.targets import current_target

Call = Callable[[], jax.Array]

REFERENCE_SCORES = 1 << 24
"""The most scores the reference may hold: it scores every query against the whole pool."""

_PLAIN = ("paged-shared-pages", "paged", "dense")  # compute softmax(q k^T / sqrt(D)) v, only that
CHECKED_ROWS = 8
CHECKED_KV_HEADS = 4


@dataclass(frozen=True)
class CaseOperands:
    """A case on the device; the fields are those of `AttentionInputs`."""

    case: AttentionCase
    seed: int
    q: jax.Array  # [B, Hq, D]
    keys: jax.Array  # [1, Hkv, N, C, D]
    values: jax.Array
    lengths: np.ndarray  # [B]
    tables: list[list[int]]
    plan: DecodePlan
    summary: PlanSummary

    @property
    def rows(self) -> int:
        return len(self.tables)

    @property
    def row_lengths(self) -> list[int]:
        return self.lengths[: self.rows].tolist()

    @property
    def flops(self) -> int:
        """Operations of the two matrix products of every row and query head."""
        return 4 * self.case.num_heads * self.case.head_dim * sum(self.row_lengths)

    @property
    def distinct_tokens(self) -> int:
        """Tokens that some row attends to, each counted once."""
        filled: dict[int, int] = {}
        for table, length in zip(self.tables, self.row_lengths, strict=True):
            for index, chunk in enumerate(table):
                tokens = min(self.case.chunk_size, length - index * self.case.chunk_size)
                filled[chunk] = max(filled.get(chunk, 0), tokens)
        return sum(filled.values())


def bytes_per_token(case: AttentionCase) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * case.num_kv_heads * case.head_dim * jnp.dtype(case.dtype).itemsize


def pool_bytes(case: AttentionCase) -> int:
    """Bytes of the case's pool, every node and every row's ragged end in chunks of their own."""
    levels = zip(case.nodes_per_level, case.tokens_per_level, strict=True)
    chunks = sum(nodes * -(-tokens // case.chunk_size) for nodes, tokens in levels)
    chunks += case.batch * -(-case.ragged // case.chunk_size)
    return chunks * case.chunk_size * bytes_per_token(case)


def copies_bytes(case: AttentionCase) -> int:
    """Bytes when every row has its own keys and values, in whole chunks."""
    chunks = -(-(sum(case.tokens_per_level) + case.ragged) // case.chunk_size)
    return case.batch * chunks * case.chunk_size * bytes_per_token(case)


def runnable_implementations() -> tuple[Implementation, ...]:
    """All that can be named, without the Pallas kernels where there is no GPU for them."""
    on_gpu = current_target().is_nvidia
    return tuple(name for name in _SIDES if on_gpu or not needs_partials(name))


def skip_reasons(
    case: AttentionCase, implementations: Sequence[Implementation], memory_gb: float
) -> dict[str, str]:
    """Those of `implementations` that cannot run this case within `memory_gb`, and why."""
    limit, held = memory_gb * 1e9, pool_bytes(case)
    if held > limit:
        reason = f"the pool takes {held / 1e9:.1f} GB, above --memory-gb {memory_gb:g}"
        return dict.fromkeys(implementations, reason)
    skipped = {}
    for name in filter(needs_partials, implementations):
        try:
            CHUNK_ATTENTION.resolve(name, _shapes(case))
        except ImplementationError as error:
            skipped[name] = str(error)
    if not case.has_plain_scores:
        reason = "it knows neither a softcap nor a scale of its own"
        skipped |= dict.fromkeys((name for name in _PLAIN if name in implementations), reason)
    for name in ("paged", "dense"):
        if name not in implementations or name in skipped:
            continue
        more = 0 if name == "paged" and not shares(case) else copies_bytes(case)
        if held + more > limit:
            skipped[name] = (
                f"its copies take {more / 1e9:.1f} GB beside {held / 1e9:.1f} GB, "
                f"above --memory-gb {memory_gb:g}"
            )
        else:
            held += more
    scores = case.batch * case.num_heads * pool_bytes(case) // bytes_per_token(case)
    if "reference" in implementations and scores > REFERENCE_SCORES:
        skipped["reference"] = (
            f"it would score every query against the whole pool, {scores / 1e6:.0f} million scores"
        )
    return skipped


def shares(case: AttentionCase) -> bool:
    """Whether any two rows have tokens in common."""
    return any(nodes < case.batch for nodes in case.nodes_per_level)


def make_operands(case: AttentionCase, seed: int) -> CaseOperands:
    """The case's plan, queries and pool; the host's copy of the pool is freed."""
    fields = dict(vars(case_inputs(case, seed=seed)))
    arrays = {}
    for name in ("q", "keys", "values"):  # one after another: a pool may be a third of all memory
        arrays[name] = jax.block_until_ready(jnp.array(fields.pop(name)))
    return CaseOperands(case, seed, **arrays, **fields)


def make_sides(operands: CaseOperands, names: tuple[Implementation, ...]) -> dict[str, Call]:
    """A call without arguments for each name; each returns [B, Hq, D] for the real rows first."""
    return {name: _SIDES[name](operands) for name in names}


def _chunk_attention(operands: CaseOperands, implementation: str, plan=None) -> Call:
    plan, lengths = jax.device_put((plan or operands.plan, operands.lengths))
    arguments = operands.q, operands.keys, operands.values, plan, lengths
    case = operands.case
    return lambda: chunk_attention(
        *arguments, scale=case.scale, softcap=case.softcap, implementation=implementation
    )


def _xla_unshared(operands: CaseOperands) -> Call:
    return _chunk_attention(operands, "xla", _plan(operands, PlannerOptions(sharing=False)))


def _on_gpu(operands: CaseOperands, implementation: str) -> Call:
    case = operands.case
    options = PlannerOptions.for_gpu(
        num_sms=current_target().num_sms,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        chunk_size=case.chunk_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
    )
    return _chunk_attention(operands, implementation, _plan(operands, options))


def _plan(operands: CaseOperands, options: PlannerOptions) -> DecodePlan:
    plan, _ = plan_decode(
        operands.tables,
        operands.row_lengths,
        chunk_size=operands.case.chunk_size,
        num_chunks=operands.keys.shape[2],
        options=options,
    )
    return plan


def _shapes(case: AttentionCase) -> AttentionShapes:
    group = case.num_heads // case.num_kv_heads
    return AttentionShapes(case.dtype, group, case.head_dim, case.chunk_size)


def _paged(operands: CaseOperands) -> Call:
    if not shares(operands.case):
        return _paged_shared_pages(operands)
    pool = operands.keys, operands.values
    return _paged_call(operands, *pool_of_copies(*pool, operands.tables, seed=operands.seed))


def _paged_shared_pages(operands: CaseOperands) -> Call:
    return _paged_call(operands, operands.keys, operands.values, operands.tables)


def _paged_call(operands: CaseOperands, keys, values, tables: list[list[int]]) -> Call:
    rows = operands.rows
    tables_and_lengths = jax.device_put((pad_tables(tables), operands.lengths[:rows]))
    q = operands.q[:rows]
    return lambda: paged_attention(q, keys, values, *tables_and_lengths)


def _dense(operands: CaseOperands) -> Call:
    rows = operands.rows
    q, lengths = operands.q[:rows], jnp.asarray(operands.lengths[:rows])
    keys = dense_copies(operands.keys, operands.tables)
    values = dense_copies(operands.values, operands.tables)
    return lambda: dense_attention(q, keys, values, lengths)


_SIDES: dict[Implementation, Callable[[CaseOperands], Call]] = {
    "pallas_mosaic_gpu": lambda operands: _on_gpu(operands, "pallas_mosaic_gpu"),
    "pallas_triton": lambda operands: _on_gpu(operands, "pallas_triton"),
    "xla": lambda operands: _chunk_attention(operands, "xla"),
    "xla-unshared": _xla_unshared,
    "paged-shared-pages": _paged_shared_pages,
    "paged": _paged,
    "dense": _dense,
    "reference": lambda operands: _chunk_attention(operands, "reference"),
}


@dataclass(frozen=True)
class Checker:
    """Largest absolute error against float64, over some rows and KV heads of a case."""

    rows: list[int]
    kv_heads: list[int]
    exact: np.ndarray  # [R, H, G, D]

    @classmethod
    def of(cls, operands: CaseOperands) -> Checker:
        """Up to `CHECKED_ROWS` rows and `CHECKED_KV_HEADS` KV heads, evenly spread."""
        rows = _spread(operands.rows, CHECKED_ROWS)
        heads = _spread(operands.case.num_kv_heads, CHECKED_KV_HEADS)
        exact = exact_attention(
            np.asarray(operands.q),
            np.asarray(operands.keys),
            np.asarray(operands.values),
            operands.tables,
            operands.row_lengths,
            rows=rows,
            kv_heads=heads,
            scale=operands.case.scale,
            softcap=operands.case.softcap,
        )
        return cls(rows, heads, exact)

    def max_error(self, output: jax.Array, kv_heads: int) -> float:
        """output [B, Hq, D]."""
        got = np.asarray(output, np.float64)
        got = got.reshape(len(got), kv_heads, -1, got.shape[-1])
        return float(np.abs(got[np.ix_(self.rows, self.kv_heads)] - self.exact).max())


def _spread(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
