"""The sides of a kernel comparison: each implementation with the operands of one case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.baselines import (
    cascade_attention,
    cascade_levels,
    dense_attention,
    jax_dot_product_attention,
    pad_tables,
    paged_attention,
    pool_of_copies,
    torch_attention,
)
from experiments.kernel.coded import coded_attention
from experiments.kernel.config import CODED, Implementation
from experiments.kernel.operands import CaseOperands, shares
from jax_chunkattn.planning.planner import PlannerOptions
from pallas_kernels import chunk_attention
from pallas_kernels.implementations import BATCH_INVARIANT, COMPILED_HERE
from pallas_kernels.targets import current_target

Call = Callable[[], Any]


def make_sides(operands: CaseOperands, names: tuple[Implementation, ...]) -> dict[str, Call]:
    """A call without arguments for each name; each returns [B, Hq, D] for the real rows first."""
    return {name: SIDES[name](operands) for name in names}


def _chunk_attention(operands: CaseOperands, implementation: str, plan=None) -> Call:
    plan, lengths = jax.device_put((plan or operands.plan, operands.lengths))
    arguments = operands.q, operands.keys, operands.values, plan, lengths
    case = operands.case
    return lambda: chunk_attention(
        *arguments, scale=case.scale, softcap=case.softcap, implementation=implementation
    )


def _xla_unshared(operands: CaseOperands) -> Call:
    return _chunk_attention(operands, "xla", operands.planned(PlannerOptions(sharing=False)))


def _compiled_here(operands: CaseOperands, implementation: str) -> Call:
    options = PlannerOptions.for_native(in_order=implementation == BATCH_INVARIANT)
    return _chunk_attention(operands, implementation, operands.planned(options))


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
    return _chunk_attention(operands, implementation, operands.planned(options))


def _paged(operands: CaseOperands) -> Call:
    if not shares(operands.case):
        return _paged_shared_pages(operands)
    pool = operands.keys, operands.values
    return _paged_call(operands, *pool_of_copies(*pool, operands.tables, seed=operands.seed))


def _paged_shared_pages(operands: CaseOperands) -> Call:
    return _paged_call(operands, operands.keys, operands.values, operands.tables)


def _paged_call(operands: CaseOperands, keys, values, tables: list[list[int]]) -> Call:
    q, lengths = operands.rows_only
    tables_and_lengths = jax.device_put((pad_tables(tables), lengths))
    return lambda: paged_attention(q, keys, values, *tables_and_lengths)


def _cascade(operands: CaseOperands) -> Call:
    pool = operands.keys, operands.values
    levels = cascade_levels(*pool, operands.tables, operands.row_lengths)
    q, _ = operands.rows_only
    return lambda: cascade_attention(q, levels)


def _dense(operands: CaseOperands) -> Call:
    q, lengths = operands.rows_only
    keys, values = operands.copies
    lengths = jnp.asarray(lengths)
    return lambda: dense_attention(q, keys, values, lengths)


def _jax_dpa(operands: CaseOperands) -> Call:
    q, lengths = operands.rows_only
    keys, values = operands.copies
    lengths = jnp.asarray(lengths)
    return lambda: jax_dot_product_attention(q, keys, values, lengths)


def _torch_sdpa(operands: CaseOperands) -> Call:
    q, lengths = operands.rows_only
    return torch_attention(q, *operands.copies, lengths)


SIDES: dict[str, Callable[[CaseOperands], Call]] = {
    "pallas_mosaic_gpu": lambda operands: _on_gpu(operands, "pallas_mosaic_gpu"),
    "pallas_triton": lambda operands: _on_gpu(operands, "pallas_triton"),
    **{name: partial(_compiled_here, implementation=name) for name in COMPILED_HERE},
    "xla": lambda operands: _chunk_attention(operands, "xla"),
    "xla-unshared": _xla_unshared,
    "cascade": _cascade,
    "paged-shared-pages": _paged_shared_pages,
    "paged": _paged,
    "dense": _dense,
    "jax-dpa": _jax_dpa,
    "torch-sdpa": _torch_sdpa,
    "reference": lambda operands: _chunk_attention(operands, "reference"),
    **{name: partial(coded_attention, coded=coded) for name, coded in CODED.items()},
}
