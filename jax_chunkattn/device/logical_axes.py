"""Laying arrays out over a mesh of devices: a mapping from what a dimension counts to its axes.

Weights and the pool declare logical axes where they are defined (`models.weights`,
`jax_chunkattn.device.pool`); only this mapping, and `jax_chunkattn.device.mesh`, know of meshes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXIS_RULES: Mapping[str, str | tuple[str, ...]] = {
    "heads": ("tp", "tp_copies"),
    "kv_heads": "tp",
    "mlp": ("tp", "tp_copies"),
    "vocab": ("tp", "tp_copies"),
}
"""Tensor parallelism as in Megatron-LM (arXiv 1909.08053): heads, MLP and vocabulary are split.

Devices along `tp_copies`, where there are more than KV heads, hold the same KV heads; see
`jax_chunkattn.device.mesh`.
"""


class MeshError(ValueError):
    """A mesh that a model or an engine cannot be laid over; the message says why."""


def logical_sharding(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Mapping[str, str | tuple[str, ...]] = AXIS_RULES,
) -> NamedSharding:
    """How an array of `shape`, whose dimensions count `axes`, lies on `mesh`.

    A dimension without a rule, or whose rule names no axis that the mesh has, is whole on every
    device; one whose rule names several is split over those that the mesh has, the first outermost.

    Raises:
      MeshError: a dimension is no multiple of the devices it is to be split over.
    """
    spec: list[str | tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        rule = rules.get(name, ()) if name is not None else ()
        over = (rule,) if isinstance(rule, str) else rule
        over = tuple(axis for axis in over if axis in mesh.shape)
        devices = math.prod(mesh.shape[axis] for axis in over)
        if size % devices:
            which = "axis" if len(over) == 1 else "axes"
            raise MeshError(
                f"{name} ({size:,}) cannot be split over the {devices} devices of the "
                f"mesh's {which} {', '.join(map(repr, over))}; leave {name!r} out of the rules to "
                "keep it whole"
            )
        spec.append(over[0] if len(over) == 1 else over or None)
    return NamedSharding(mesh, PartitionSpec(*spec))
