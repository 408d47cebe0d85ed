"""What tells one model, and what a pool keeps of it, from any other, in all processes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_transfers import ChunkLayout
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.programs import SplitModel
from pallas_kernels.codecs import ChunkCodec

SEEDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
"""Of four sums of 32 bits: digits of pi."""
_SILENT = (" object at 0x", "<lambda>", "<locals>")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def is_told(model: SplitModel) -> bool:
    """Whether what a model's definition says tells it from models of other constants: not where it
    has objects that say nothing but their address, or functions that may have closed over some."""
    text = repr(model.definition)
    return not any(silent in text for silent in _SILENT)


def namespace_parts(
    model: SplitModel,
    spec: CacheSpec,
    cache: CacheConfig,
    layout: ChunkLayout,
    *,
    batch_invariant: bool,
) -> dict[str, Any]:
    """All that a chunk's bytes depend on beside the tokens: for `tiers.names.namespace_of`.

    Rounding is not among it, but where it never differs: with `batch_invariant` arithmetic the
    compiled kernel counts too, which is one for each processor. The weights are read once, where
    they are. Another release of what defines the model may give other parts for the same one, which
    then finds nothing that was kept.
    """
    codec, clusters = cache.chunk_codec, cache.clusters
    return {
        "model": _ADDRESS.sub("", repr(model.definition)),
        "weights": digest_of(model.arrays).hex(),
        "attention": repr(spec),
        "chunk": [cache.chunk_size, cache.dtype, layout.parts],
        "codec": None if codec is None else _codec_parts(codec),
        "selector": repr(cache.selector),
        "clusters": None if clusters is None else repr(clusters),
        "kernel": _compiled_kernel() if batch_invariant else None,
    }


def digest_of(arrays: Sequence[Array]) -> bytes:
    """A hash of arrays, their order and shapes: 32 bytes.

    Each is hashed on its device, at about the rate of its memory. That tells apart what differs by
    training or by mistake, not what somebody has made to collide.
    """
    hashed = hashlib.blake2b(digest_size=32)
    # Placed where they are, new weights' arrays are to JAX what the old ones' were.
    sums = [_hash(jax.device_put(array, array.sharding)) for array in arrays]
    for array, of_one in zip(arrays, sums, strict=True):
        hashed.update(repr((array.shape, str(array.dtype))).encode())
        hashed.update(np.asarray(of_one).tobytes())
    return hashed.digest()


@jax.jit
def _hash(array: Array) -> UInt32[Array, " 4"]:
    """Four sums over all numbers, each mixed with its place."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(array, words).astype(jnp.uint32).reshape(-1)
    place = lax.iota(jnp.uint32, bits.size)

    def mixed(seed: int) -> UInt32[Array, ""]:
        word = (bits ^ jnp.uint32(seed)) * jnp.uint32(0x9E3779B1) + place * jnp.uint32(0x85EBCA77)
        word = (word ^ (word >> 15)) * jnp.uint32(0x2C1B3C6D)
        word = (word ^ (word >> 12)) * jnp.uint32(0x297A2D39)
        return (word ^ (word >> 15)).sum(dtype=jnp.uint32)

    return jnp.stack([*map(mixed, SEEDS)])


def _compiled_kernel() -> str:
    from pallas_kernels.native import build  # needs a compiler

    return build.build().stem


def _codec_parts(codec: ChunkCodec) -> list[Any]:
    constants = jax.tree.leaves((dict(codec.constants.keys), dict(codec.constants.values)))
    hashed = hashlib.blake2b(digest_size=16)
    for one in map(np.asarray, constants):
        hashed.update(repr((one.shape, str(one.dtype))).encode() + one.tobytes())
    return [codec.name, repr(codec.keys), repr(codec.values), hashed.hexdigest()]
