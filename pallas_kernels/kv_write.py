"""Writing new keys and values into the pool, in place when the pool is donated."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.plans import HostOrDevice
from pallas_kernels.stored_kv import StoredKV


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
    """The pool with `k[t]`, `v[t]` in slot `offsets[t]` of chunk `chunks[t]` of a layer.

    What is cast, dropped and made finite: see `StoredKV.write`.
    """
    stored = StoredKV(keys, values, layer).write(k, v, chunks, offsets)
    return stored.keys, stored.values
