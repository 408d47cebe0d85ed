"""Whole programs to compile: the decode loop and a prefill call of a large model, as shapes only.

Nothing is allocated, so a 16 GB model with a 34 GB pool compiles on a laptop.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compile_report.cases import Case, CaseTable, abstract
from experiments.compile_report.program_sizes import (
    ProgramSize,
    abstract_pool,
    abstract_state,
    decode_arguments,
    pool_sizes,
)
from experiments.compile_report.target import GpuTarget
from experiments.compile_report.tensor_parallel import tensor_parallel_case
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import SplitModel
from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import Segment, max_segments, pack_segments
from models.building import abstract_decoder
from pallas_kernels.chunk_attention.api import IMPLEMENTATIONS as DECODE_IMPLEMENTATIONS
from pallas_kernels.implementations import COMPILED_HERE, needs_partials
from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS as PREFILL_IMPLEMENTATIONS

SEVERAL_GPUS = (4, 8)
FOR_CPUS = ("reference", *COMPILED_HERE)  # the first is not made to be compiled at this size


def whole_programs(
    size: ProgramSize = ProgramSize(), implementations: Collection[str] | None = None
) -> CaseTable:
    """The programs of all implementations, or of those named, by name."""

    def chosen(known: Collection[str]) -> list[str]:
        return [
            name
            for name in known
            if name not in FOR_CPUS and (implementations is None or name in implementations)
        ]

    table = {}
    for name in chosen(DECODE_IMPLEMENTATIONS):
        table[f"decode loop, {name}"] = partial(decode_case, size, name)
        for gpus in SEVERAL_GPUS:
            case = partial(tensor_parallel_case, size, name, gpus)
            table[f"decode loop on {gpus} GPUs, {name}"] = case
    for name in chosen(PREFILL_IMPLEMENTATIONS):
        table[f"prefill, {name}"] = partial(prefill_case, size, name)
    return table


def decode_case(size: ProgramSize, implementation: str, target: GpuTarget) -> Case:
    """K steps for B rows."""
    model = _abstract_model(size)
    pool = abstract_pool(size)
    state, *rest = decode_arguments(size, pool)

    def decode(leaves, *arguments):
        return decode_steps(
            model.merge(leaves), *arguments, num_steps=size.steps, implementation=implementation
        )

    return Case(decode, (model.leaves, state, *rest), (1,), *pool_sizes(pool))


def prefill_case(size: ProgramSize, implementation: str, target: GpuTarget) -> Case:
    """T new tokens of one sequence behind a cached prompt."""
    model = _abstract_model(size)
    pool = abstract_pool(size)
    tokens, cached = size.prefill_tokens, 2 * size.prefill_tokens
    chunks = list(range(-(-(cached + tokens) // size.chunk_size)))
    segment = Segment([0] * tokens, chunks, cached, cached + tokens, cached)
    batch = pack_segments(
        [segment],
        num_tokens=tokens,
        chunk_size=size.chunk_size,
        num_chunks=size.num_chunks,
        options=_planner_options(size, implementation),
    )
    state = abstract_state(size, pool)

    def prefill(leaves, *arguments):
        return prefill_step(model.merge(leaves), *arguments, implementation=implementation)

    arguments = (model.leaves, state, abstract((max_segments(tokens),)), *_shapes((batch,)))
    return Case(prefill, arguments, (1,), *pool_sizes(pool))


def _planner_options(size: ProgramSize, implementation: str) -> PlannerOptions:
    if not needs_partials(implementation):
        return PlannerOptions()
    config = size.config
    return PlannerOptions.for_gpu(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        chunk_size=size.chunk_size,
    )


def _abstract_model(size: ProgramSize) -> SplitModel:
    return SplitModel.of(abstract_decoder(size.config, size.dtype, unroll=True))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: abstract(jnp.shape(x), x.dtype), tree)
