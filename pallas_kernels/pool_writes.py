"""Writing into the arrays of a pool, in place when they are donated.

XLA writes in place, but for bfloat16 on CPUs with jaxlib 0.10.2: there a scatter converts the whole
array to float32 and back. Where there is a compiled kernel it writes those.
"""

from __future__ import annotations

from importlib import import_module

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import native
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.targets import current_target


def put_tokens(
    pool: Float[Array, "L H S C D"],
    new: Float[Array, "T H D"],
    layer: int | Int32[Array, ""],
    slots: Int32[HostOrDevice, "*H T"],
    offsets: Int32[HostOrDevice, " T"],
) -> Float[Array, "L H S C D"]:
    """The pool with tokens in a layer's slots, those of all heads or of each; slot S drops one.

    Casts to the pool's dtype. No two tokens may name one place.
    """
    new = new.astype(pool.dtype)
    if _is_native(pool):
        writes = import_module("pallas_kernels.native.writes")
        return writes.put_tokens(pool, new, layer, slots, offsets)
    if jnp.ndim(slots) == 1:
        place = slice(None), slots, offsets
    else:
        heads = jnp.arange(pool.shape[1], dtype=jnp.int32)
        place = heads[None], jnp.asarray(slots).T, jnp.asarray(offsets)[:, None]
    return pool.at[layer, *place].set(new, mode="drop", unique_indices=True)


def copy_slots(
    array: Shaped[Array, "*shape"],
    sources: Int32[HostOrDevice, " M"],
    destinations: Int32[HostOrDevice, " M"],
    axis: int,
) -> Shaped[Array, "*shape"]:
    """The array with some of what an axis counts copied, all read before any is written; a
    destination behind the last drops one. With heads and layers before it, it is axis 2."""
    return put_slots(array, array[*(slice(None),) * axis, sources], destinations, axis)


def put_slots(
    array: Shaped[Array, "*shape"],
    new: Shaped[HostOrDevice, "*of_slots"],
    slots: Int32[HostOrDevice, " M"],
    axis: int,
) -> Shaped[Array, "*shape"]:
    """The array with other numbers for some of what an axis counts; one behind the last is dropped.
    With heads and layers before it, it is axis 2."""
    if _is_native(array):
        writes = import_module("pallas_kernels.native.writes")
        return writes.put_slots(array, new, slots, axis)
    return array.at[*(slice(None),) * axis, slots].set(new, mode="drop")


def _is_native(pool: Array) -> bool:
    return pool.dtype == jnp.bfloat16 and native.problem_on(current_target()) is None
