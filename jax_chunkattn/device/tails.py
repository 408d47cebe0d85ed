"""Full chunks that are kept in another form, and tails: the exact last chunk of each slot's row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.plans import HostOrDevice
from pallas_kernels.pool_writes import copy_slots, put_tokens

Arrays = TypeVar("Arrays")
"""Any tree of arrays."""


def empty(
    arrays: Mapping[str, jax.ShapeDtypeStruct], *outer: int
) -> dict[str, Shaped[Array, "*_"]]:
    """Zeros in the shapes of what is kept of one chunk of one head, by name, of so many."""
    return {name: jnp.zeros((*outer, *one.shape), one.dtype) for name, one in arrays.items()}


def as_kept(
    k: Float[Array, "*some D"], v: Float[Array, "*some D"], dtype: jnp.dtype
) -> tuple[Float[Array, "*some D"], Float[Array, "*some D"]]:
    """Keys and values as tails keep them, so that it does not matter where a token was read; values
    are finite, for the reason that `StoredKV.write` has."""
    return k.astype(dtype), jnp.nan_to_num(v.astype(dtype))


def written(
    tails: Arrays,
    new: Arrays,
    layer: Int32[Array, ""],
    slots: Int32[HostOrDevice, " T"],
    offsets: Int32[HostOrDevice, " T"],
) -> Arrays:
    """Tails `[L, H, S, C, D]` with new tokens `[T, H, D]` of a layer; slot S drops one."""

    return jax.tree.map(
        lambda tail, tokens: put_tokens(tail, tokens, layer, slots, offsets), tails, new
    )


def copied(
    arrays: Arrays,
    sources: Int32[HostOrDevice, " M"],
    destinations: Int32[HostOrDevice, " M"],
) -> Arrays:
    """Tails with those of some slots copied; all are read before any is written. A destination
    behind the last drops one."""
    return jax.tree.map(lambda tails: copy_slots(tails, sources, destinations, 2), arrays)
