"""The option `--mesh`: over how many devices model and pool lie."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.harness.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

MeshShape = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="tp=INT",
        help="Devices that model and KV cache are split over: heads, MLP and vocabulary.",
        help_behavior_hint="(default: one device)",
    ),
]
"""The option `--mesh` of what runs an engine; see `jax_chunkattn.device.mesh`."""

_SHAPE = re.compile(r"tp=([1-9]\d*)", re.ASCII)


def mesh_devices(shape: str | None) -> int | None:
    """How many devices a `--mesh` has.

    Raises:
        UserError: it is not such as tp=4.
    """
    if shape is None:
        return None
    found = _SHAPE.fullmatch(shape)
    if found is None:
        raise UserError(f"--mesh takes tp=DEVICES, such as tp=4, got {shape}")
    return int(found[1])


def chosen_mesh(shape: str | None) -> Mesh | None:
    """The mesh of a `--mesh`: the first devices that there are, along `tp`.

    Raises:
        UserError: there are fewer devices, or it is not such as tp=4.
    """
    devices = mesh_devices(shape)
    if devices is None:
        return None
    import jax
    import numpy as np
    from jax.sharding import Mesh

    found = jax.devices()
    if len(found) < devices:
        hint = ""
        if found[0].platform == "cpu":
            hint = (
                "; a CPU is as many as XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{devices} in the environment says"
            )
        there = "there is 1" if len(found) == 1 else f"there are {len(found)}"
        raise UserError(f"--mesh {shape} needs {devices} devices, and {there}{hint}")
    return Mesh(np.array(found[:devices]), ("tp",))
