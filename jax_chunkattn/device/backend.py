"""Which kernels an engine runs, and how work is planned for them."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.mesh import EngineMesh
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.sampling.row_sums import IN_XLA, RowSums
from pallas_kernels import native, products
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.implementations import (
    BATCH_INVARIANT,
    COMPILED_HERE,
    AttentionShapes,
    needs_partials,
)
from pallas_kernels.prefill_attention import PREFILL_ATTENTION
from pallas_kernels.targets import current_target


@dataclass(frozen=True)
class Backend:
    """Implementations of attention by name, and the planner's options that suit them."""

    decode: str
    prefill: str
    planner: PlannerOptions


def choose_backend(
    spec: CacheSpec,
    cache: CacheConfig,
    *,
    implementation: str | None = None,
    planner: PlannerOptions | None = None,
    mesh: EngineMesh | None = None,
) -> Backend:
    """The backend for a model's attention on this device.

    Args:
      implementation: of decoding; prefill uses the same if it has it, else the best it has here.
      planner: overrides how work is planned.
      mesh: of the devices that attend, each for its own heads; None is one.

    Raises:
      ImplementationError: for an implementation that is unknown or cannot run here.
      ValueError: for a planner without the slots for partials, or the order, that the
        implementation needs.
    """
    if mesh is not None:
        spec = mesh.own_spec(spec)
    clustered = cache.clusters is not None
    sizes = _attended_heads(spec, cache).group, spec.head_dim, cache.chunk_size
    chosen = cache.selector is not None
    shapes = AttentionShapes(cache.dtype, *sizes, cache.chunk_codec, chosen, clustered)
    decode = CHUNK_ATTENTION.resolve(implementation, shapes)
    has_prefill = decode in PREFILL_ATTENTION.implementations
    prefill = PREFILL_ATTENTION.resolve(decode if has_prefill else None, shapes)
    if planner is None:
        planner = _planner_for(decode, spec, cache)
    elif planner.gpu is None and needs_partials(decode):
        raise ValueError(f"{decode} needs plans for a GPU: PlannerOptions.for_gpu(...)")
    elif decode == BATCH_INVARIANT and (planner.gpu is not None or not planner.in_order):
        needed = "PlannerOptions.for_native(in_order=True)"
        raise ValueError(f"{decode} needs plans in the order of sequences: {needed}")
    return Backend(decode, prefill, planner)


def chooses_compiled(implementation: str | None) -> bool:
    """Whether the kernel compiled for this CPU finds what queries choose where attention is
    computed so: unless another implementation is named, wherever the kernel is there."""
    if implementation is None:
        return native.problem_on(current_target()) is None
    return implementation in COMPILED_HERE


def row_sums_for(implementation: str | None) -> RowSums:
    """How sums over the vocabulary are computed where attention is computed so."""
    if implementation != BATCH_INVARIANT:
        return IN_XLA
    return RowSums(products.sum_rows, products.exponentials)


def _attended_heads(spec: CacheSpec, cache: CacheConfig) -> GroupedHeads:
    """As attention to the pool sees them."""
    attention = spec.attention
    return attention.heads if cache.clusters is None else attention.by_query_head.heads


def _planner_for(implementation: str, spec: CacheSpec, cache: CacheConfig) -> PlannerOptions:
    if implementation in COMPILED_HERE:
        return PlannerOptions.for_native(in_order=implementation == BATCH_INVARIANT)
    if not needs_partials(implementation):
        return PlannerOptions()
    heads = _attended_heads(spec, cache)
    return PlannerOptions.for_gpu(
        num_sms=current_target().num_sms,
        num_heads=heads.query_heads,
        num_kv_heads=heads.kv_heads,
        head_dim=spec.head_dim,
        chunk_size=cache.chunk_size,
        dtype_bytes=jnp.dtype(cache.dtype).itemsize,
    )
