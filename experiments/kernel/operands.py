"""A case of a kernel comparison on the device, what it takes, and what is right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines import dense_copies, exact_attention
from jax_chunkattn.planning.planner import PlannerOptions, PlanSummary, plan_decode
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels import DecodePlan
from pallas_kernels.specs import AttentionCase

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
    def rows_only(self) -> tuple[jax.Array, np.ndarray]:
        """Queries and lengths without the plan's padding."""
        return self.q[: self.rows], self.lengths[: self.rows]

    @cached_property
    def copies(self) -> tuple[jax.Array, jax.Array]:
        """Every row's keys and values in one piece, [B, Hkv, T, D]."""
        keys, values = (dense_copies(pool, self.tables) for pool in (self.keys, self.values))
        return keys, values

    def planned(self, options: PlannerOptions) -> DecodePlan:
        """Another plan for the same pool."""
        plan, _ = plan_decode(
            self.tables,
            self.row_lengths,
            chunk_size=self.case.chunk_size,
            num_chunks=self.keys.shape[2],
            options=options,
        )
        return plan

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

    def max_error(self, output: jax.Array | np.ndarray, kv_heads: int) -> float:
        """output [B, Hq, D]."""
        got = np.asarray(output, np.float64)
        got = got.reshape(len(got), kv_heads, -1, got.shape[-1])
        return float(np.abs(got[np.ix_(self.rows, self.kv_heads)] - self.exact).max())


def _spread(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
