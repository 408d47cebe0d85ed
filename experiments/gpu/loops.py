"""The programs whose time is attention's: a loop of attention calls over the layers of a pool.

Each call's output is the next one's queries, so none can be left out or run beside another, and
reads the next layer of the pool, so that what it finds in the L2 cache is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.gpu.bench import Bench, Program
from experiments.gpu.clock import Side
from experiments.gpu.pools import Buffers, PoolShape
from experiments.gpu.tables import CaseTables
from jax_chunkattn.planning.planner import PlannerOptions, PlanShape, PlanSummary, plan_decode
from pallas_kernels import DecodePlan, chunk_attention
from pallas_kernels.implementations import needs_partials
from pallas_kernels.specs import AttentionCase
from pallas_kernels.targets import current_target

# Calls of a program where a call is quick and where it is slow, and calls in one turn of its loop:
# a turn also counts up and compares, which are kernels of their own.
MANY_CALLS, FEW_CALLS, UNROLLED = 64, 8, 4
SLOW_SECONDS = 200e-6
# Sizes of a plan that cost no time when they are larger, only programs when they differ.
SHARED_SHAPE = PlanShape(item_chunks=1 << 16, private_chunks=16, slots=1 << 13)


@dataclass(frozen=True)
class LoopSize:
    calls: int
    unrolled: int

    @classmethod
    def of(cls, small: bool, seconds: float | None) -> LoopSize:
        """For calls that are estimated to take `seconds`; None if there is no estimate."""
        if small:
            return cls(1, 1)
        quick = seconds is not None and seconds < SLOW_SECONDS
        return cls(MANY_CALLS if quick else FEW_CALLS, UNROLLED)


@dataclass(frozen=True)
class PlannedCase:
    """A case with its place in the buffers and a plan."""

    case: AttentionCase
    pool: PoolShape
    plan: DecodePlan
    lengths: np.ndarray  # [B], of the padded batch
    summary: PlanSummary

    @property
    def queries(self) -> Any:
        shape = (len(self.lengths), self.case.num_heads, self.case.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.case.dtype))


def planner_options(
    case: AttentionCase, implementation: str, *, sharing: bool = True, **work
) -> PlannerOptions:
    """Options that suit an implementation; `work` overrides fields of `GpuWork`."""
    if not needs_partials(implementation):
        return PlannerOptions(sharing=sharing)
    return PlannerOptions.for_gpu(
        sharing=sharing,
        **{
            "num_sms": current_target().num_sms,
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "chunk_size": case.chunk_size,
            "dtype_bytes": jnp.dtype(case.dtype).itemsize,
            **work,
        },
    )


def plan_case(
    case: AttentionCase,
    tables: CaseTables,
    options: PlannerOptions,
    *,
    small: bool,
    seed: int = 0,
    encoded: bool = False,
) -> PlannedCase:
    """`encoded` plans without the token that a step writes, so that no item has a last chunk."""
    pool = PoolShape.of(case, tables.num_chunks, small)
    plan, summary = plan_decode(
        tables.placed(pool.num_chunks, seed).tolist(),
        [length - encoded for length in tables.lengths],
        chunk_size=case.chunk_size,
        num_chunks=pool.num_chunks,
        options=options,
        at_least=PlanShape() if small else SHARED_SHAPE,
    )
    lengths = np.zeros(plan.num_rows, np.int32)
    lengths[: tables.rows] = tables.length
    return PlannedCase(case, pool, plan, lengths, summary)


def loop_program(
    planned: PlannedCase,
    implementation: str,
    buffers: Buffers,
    size: LoopSize,
    attend: Callable | None = None,
) -> Program:
    """The loop of one implementation; called with (q, keys, values, plan, lengths, first layer).

    `attend` replaces `chunk_attention`, for variants that it has no option for; `implementation`
    then only names it.
    """
    case, shape = planned.case, planned.pool.shape

    def call(q, keys, values, plan, lengths, layer):
        if attend is not None:
            return attend(q, keys, values, plan, lengths, layer)
        how = {"scale": case.scale, "softcap": case.softcap, "implementation": implementation}
        return chunk_attention(q, keys, values, plan, lengths, layer=layer, **how)

    call_once = jax.jit(call)

    def run(q, keys, values, plan, lengths, first):
        keys, values = keys.reshape(shape), values.reshape(shape)

        def turn(index, q):
            for ahead in range(size.unrolled):
                layer = lax.rem(first + index * size.unrolled + ahead, jnp.int32(shape[0]))
                q = call_once(q, keys, values, plan, lengths, layer)
            return q

        return lax.fori_loop(0, size.calls // size.unrolled, turn, q)

    lengths = jax.ShapeDtypeStruct(planned.lengths.shape, jnp.int32)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    pools = buffers.abstract(case.dtype)
    arguments = (planned.queries, *pools, planned.plan, lengths, first)
    shapes = jax.tree.map(lambda x: (jnp.shape(x), str(x.dtype)), arguments)
    scores = (case.scale, case.softcap)
    key = ("loop", implementation, shape, size, *scores, *jax.tree.leaves(shapes))
    return Program(key, run, arguments)


def loop_side(
    bench: Bench, program: Program, planned: PlannedCase, buffers: Buffers, size: LoopSize
) -> Side:
    """The loop as something to time.

    Raises:
      Exception: what its compilation raised.
    """
    run = bench.get(program)
    keys, values = buffers.get(planned.case.dtype)
    plan, lengths = jax.device_put((planned.plan, planned.lengths))
    layers = planned.pool.layers
    first = [jnp.int32(i * size.calls % layers) for i in range(-(-layers // size.calls))]
    queries = planned.queries
    q = jax.random.normal(jax.random.key(bench.seed), queries.shape, jnp.float32)
    q = q.astype(queries.dtype)

    def call(index: int):
        return run(q, keys, values, plan, lengths, first[index % len(first)])

    return Side(call, size.calls)


def empty_loop_program(size: LoopSize) -> Program:
    """The same loop without attention: what counting and comparing take."""

    def run(total, first):
        def turn(index, total):
            for ahead in range(size.unrolled):
                total = total + lax.rem(first + index * size.unrolled + ahead, jnp.int32(7))
            return total

        return lax.fori_loop(0, size.calls // size.unrolled, turn, total)

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return Program(("empty loop", size), run, (scalar, scalar))
