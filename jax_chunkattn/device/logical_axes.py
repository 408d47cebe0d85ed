"""Laying arrays out over a mesh of devices: a mapping from what a dimension counts to an axis.

Weights and the pool declare logical axes where they are defined (`models.weights`,
`jax_chunkattn.device.pool`); only this mapping knows of meshes.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS_RULES: Mapping[str, str] = {"heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp"}
"""Tensor parallelism as in Megatron-LM (arXiv 1909.08053): heads, MLP and vocabulary are split."""


def logical_sharding(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Mapping[str, str] = AXIS_RULES,
) -> NamedSharding:
    """How an array of `shape`, whose dimensions count `axes`, lies on `mesh`.

    A dimension without a rule, or whose rule names an axis the mesh does not have, is whole on
    every device.

    Raises:
      ValueError: a dimension is no multiple of the devices it is to be split over.
    """
    spec = [rules.get(axis) if axis is not None else None for axis in axes]
    spec = [axis if axis in mesh.shape else None for axis in spec]
    for name, axis, size in zip(axes, spec, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name} ({size:,}) cannot be split over the {mesh.shape[axis]} devices of the "
                f"mesh's axis {axis!r}; leave {name!r} out of the rules to keep it whole"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))
