"""The chunk pool: the device arrays that hold every chunk of every layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.model_interface import CacheSpec
from pallas_kernels.stored_kv import StoredKV


@dataclass(frozen=True)
class CacheConfig:
    """Size and type of the pool.

    Attributes:
      num_chunks: chunks in the pool, N; None takes as many as fit into `memory`.
      chunk_size: tokens a chunk holds, C.
      dtype: of keys and values. Prefer float32 on CPU, where jaxlib 0.10.2 converts a bfloat16
        pool as a whole at every write.
      memory: of the pool, in bytes or as text with a unit: "2GiB", "500 MB". Instead of
        `num_chunks`, not beside it.

    Raises:
      ValueError: for sizes below 1, a memory that cannot be read, or a dtype that is not a float.
    """

    num_chunks: int | None = None
    chunk_size: int = 64
    dtype: str = "float32"
    memory: int | str | None = None

    def __post_init__(self):
        if (self.num_chunks is None) == (self.memory is None):
            raise ValueError("a pool needs num_chunks or memory, and not both")
        if self.memory is not None:
            parse_bytes(self.memory)
        for name in ("num_chunks", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float16 for a KV pool, got {self.dtype!r}"
            )

    def chunks_for(self, spec: CacheSpec) -> int:
        """Chunks in the pool of a model, N: those asked for, or those that fit into `memory`.

        Raises:
          ValueError: when not even one fits.
        """
        if self.num_chunks is not None:
            return self.num_chunks
        assert self.memory is not None, "checked when made"
        num_chunks = parse_bytes(self.memory) // self.bytes_per_chunk(spec)
        if num_chunks < 1:
            raise ValueError(
                f"a chunk takes {self.bytes_per_chunk(spec):,} bytes, memory is {self.memory}"
            )
        return num_chunks

    def bytes_per_chunk(self, spec: CacheSpec) -> int:
        """Bytes that one chunk's keys and values take over all layers."""
        return spec.values_per_token * self.chunk_size * jnp.dtype(self.dtype).itemsize


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as 1000, "500 MB" (decimal) or "2GiB" (binary).

    Raises:
      ValueError: for anything else, or less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", str(size).strip())
    if match is None:
        raise ValueError(f"a size is a number of bytes or such as '500MB' or '2GiB', got {size!r}")
    number, prefix, binary = match.groups()
    exponent = " KMGT".index(prefix or " ")
    count = int(float(number) * (1024 if binary else 1000) ** exponent)
    if count < 1:
        raise ValueError(f"a size must be at least a byte, got {size!r}")
    return count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkPool:
    """Keys and values of all layers, head-major: one head's chunk is a contiguous [C, D] tile."""

    AXES: ClassVar[tuple[str, ...]] = ("layers", "kv_heads", "chunks", "chunk_tokens", "head_dim")
    """What the dimensions of both arrays count; see `jax_chunkattn.device.logical_axes`."""

    keys: Float[Array, "L Hkv N C D"]
    values: Float[Array, "L Hkv N C D"]

    @classmethod
    def of(cls, stored: StoredKV) -> ChunkPool:
        """The pool that a layer was read from, or written to."""
        return cls(stored.keys, stored.values)

    def at_layer(self, layer: Int32[Array, ""]) -> StoredKV:
        """Keys and values of one layer, where they are."""
        return StoredKV(self.keys, self.values, layer)

    @property
    def num_chunks(self) -> int:
        return self.keys.shape[2]

    @property
    def chunk_size(self) -> int:
        return self.keys.shape[3]


def allocate_pool(spec: CacheSpec, config: CacheConfig) -> ChunkPool:
    """A pool of zeros on the default device."""
    shape = (
        spec.num_layers,
        spec.num_kv_heads,
        config.chunks_for(spec),
        config.chunk_size,
        spec.head_dim,
    )
    return ChunkPool(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
