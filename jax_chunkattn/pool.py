"""The chunk pool: the device arrays that hold every chunk of every layer."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_chunkattn.model_interface import CacheSpec


@dataclass(frozen=True)
class CacheConfig:
    """Size and type of the pool.

    Attributes:
      num_chunks: chunks in the pool, N.
      chunk_size: tokens a chunk holds, C.
      dtype: of keys and values. Prefer float32 on CPU, where jaxlib 0.10.2 converts a bfloat16
        pool as a whole at every write.

    Raises:
      ValueError: for sizes below 1 or a dtype that is not a float.
    """

    num_chunks: int
    chunk_size: int = 64
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("num_chunks", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float16 for a KV pool, got {self.dtype!r}"
            )

    def bytes_per_chunk(self, spec: CacheSpec) -> int:
        """Bytes that one chunk's keys and values take over all layers."""
        per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        return per_token * self.chunk_size * jnp.dtype(self.dtype).itemsize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkPool:
    """Keys and values of all layers, head-major: one head's chunk is a contiguous [C, D] tile."""

    keys: Float[Array, "L Hkv N C D"]
    values: Float[Array, "L Hkv N C D"]

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
        config.num_chunks,
        config.chunk_size,
        spec.head_dim,
    )
    return ChunkPool(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
