"""Writing new keys and values into the pool, in place when the pool is donated."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.plans import HostOrDevice


def write_kv(
    keys: Float[Array, "L Hkv N C D"],
    values: Float[Array, "L Hkv N C D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    chunks: Int32[HostOrDevice, " T"],
    offsets: Int32[HostOrDevice, " T"],
    *,
    layer: int | Int32[Array, ""],
) -> tuple[Float[Array, "L Hkv N C D"], Float[Array, "L Hkv N C D"]]:
    """The pool with `k[t]`, `v[t]` stored in slot `offsets[t]` of chunk `chunks[t]`.

    A chunk of N or more drops the token. No two tokens may name one slot. Casts to the pool's
    dtype. Values are stored as finite numbers, 0 for NaN and the dtype's largest for what overflows
    it: attention multiplies every value of a chunk it reads, those no query sees by a weight of 0,
    and an infinity left in a chunk would reach whoever has it next. Keys are stored as they are,
    because a masked score is replaced and not multiplied. On XLA:CPU with jaxlib 0.10.2 a
    bfloat16 scatter converts the whole pool to float32 and back; float32 and float16 are written in
    place.
    """

    def put(pool, new):
        target = pool.at[layer, :, chunks, offsets]
        return target.set(new.astype(pool.dtype), mode="drop", unique_indices=True)

    return put(keys, k), put(values, jnp.nan_to_num(v.astype(values.dtype)))
