"""A call that each device of a mesh makes for the heads it keeps.

XLA does not see what a call into a library does, and would gather all of its operands, the pool
among them, on each device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels.plans import HostOrDevice


def split_by_heads(
    function: Callable[..., Array],
    operands: Sequence[HostOrDevice],
    axes: Sequence[int | None],
    *,
    group: int = 1,
) -> Array:
    """What a function gives, where each KV head is by itself.

    Args:
      function: takes all operands, or those of some KV heads, and gives an array like the first.
      operands: arrays, in the function's order.
      axes: which of their axes counts KV heads, if one does.
      group: what the axis of the first operand counts for each KV head, such as query heads.
    """
    pool = max(range(len(axes)), key=lambda at: (axes[at] is not None, operands[at].size))

    def partition(mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct], result: object):
        spec, axis = shapes[pool].sharding.spec, axes[pool]
        heads = spec[axis] if axis is not None and axis < len(spec) else None

        def place(axis: int | None) -> NamedSharding:
            dims = () if axis is None else (*[None] * axis, heads)
            return NamedSharding(mesh, PartitionSpec(*dims))

        return mesh, function, place(axes[0]), tuple(map(place, axes))

    def infer(mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct], result: object) -> NamedSharding:
        return partition(mesh, shapes, result)[2]

    split = custom_partitioning(function)
    rule = _sharding_rule(operands, axes, group)
    split.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return sequential_vmap(split)(*operands)


def _sharding_rule(
    operands: Sequence[HostOrDevice], axes: Sequence[int | None], group: int
) -> SdyShardingRule:
    """Heads go together; no other dimensions do."""
    mappings: list[ArrayMapping] = []
    for at, (operand, axis) in enumerate(zip(operands, axes, strict=True)):
        factors: list[str | CompoundFactor] = [f"d{at}_{i}" for i in range(operand.ndim)]
        if axis is not None:
            grouped = at == 0 and group > 1
            factors[axis] = CompoundFactor("heads", "group") if grouped else "heads"
        mappings.append(ArrayMapping(*factors))
    sizes: dict[str, Any] = {"group": group} if group > 1 else {}
    return SdyShardingRule(tuple(mappings), (mappings[0],), **sizes)
