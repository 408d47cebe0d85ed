"""Writing into the pool where it is, with the compiled kernel, whatever XLA would do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.native import library
from pallas_kernels.native.devices import split_by_heads
from pallas_kernels.plans import HostOrDevice


def put_tokens(
    pool: Float[Array, "L H S C D"],
    new: Float[Array, "T H D"],
    layer: int | Int32[Array, ""],
    slots: Int32[HostOrDevice, "*H T"],
    offsets: Int32[HostOrDevice, " T"],
) -> Float[Array, "L H S C D"]:
    """The pool with tokens in a layer's slots, of all heads or of each; slot S drops one."""
    by_head = np.ndim(slots) == 2

    def put(pool: Array, new: Array, layer: Array, slots: Array, offsets: Array) -> Array:
        head = jnp.arange(pool.shape[1], dtype=jnp.int32)[None]
        slot = slots.T if by_head else slots[:, None]
        return _put_rows(pool, (layer, head, slot, offsets[:, None]), new)

    operands = pool, new, *map(_ints, (layer, slots, offsets))
    return split_by_heads(put, operands, (1, 1, None, 0 if by_head else None, None))


def put_slots(array: Array, new: Array, slots: Int32[HostOrDevice, " M"], axis: int) -> Array:
    """The array with other slots, which an axis counts; one behind the last drops one. Heads, if
    there are some, are on the axis before it."""

    def put(array: Array, new: Array, slots: Array) -> Array:
        *before, _ = jnp.indices(new.shape[: axis + 1], jnp.int32, sparse=True)
        return _put_rows(array, (*before, slots.reshape(*axis * (1,), -1)), new)

    heads = 1 if axis == 2 else None
    return split_by_heads(put, (array, new, _ints(slots)), (heads, heads, None))


def _put_rows(array: Array, index: tuple[Array, ...], new: Array) -> Array:
    """`array.at[index].set(new, mode="drop")` where all of the index are arrays."""
    sizes = array.shape[: len(index)]
    if np.prod(sizes) > np.iinfo(np.int32).max:
        raise ValueError(
            f"an array of {np.prod(sizes):,} rows has too many for the compiled kernel"
        )
    place, inside = jnp.int32(0), jnp.bool_(True)
    for one, size in zip(index, sizes, strict=True):
        place, inside = place * size + one, inside & (one >= 0) & (one < size)
    rows = new.shape[: new.ndim - array.ndim + len(index)]
    places = jnp.broadcast_to(jnp.where(inside, place, -1), rows)
    output = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return library.call(library.PUT_ROWS, (array, new, places), output, in_place=True)


def _ints(array: int | HostOrDevice) -> Array:
    return jnp.asarray(array, jnp.int32)
