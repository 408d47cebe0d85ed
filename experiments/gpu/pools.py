"""One buffer of keys and one of values for all cases, seen as a pool of each case's shape.

A view of another shape costs nothing and leaves the buffer where it is, while a part of it would be
copied. So all cases share two large buffers, and with few numbers of chunks, few programs. A case
uses some of the chunks of each layer; its pool has as many layers as the buffers have room for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.specs import AttentionCase

MEASURED_ELEMENTS = 1 << 33  # of each buffer, 17 GB in bfloat16
SMALL_ELEMENTS = 1 << 20
MEASURED_CHUNKS = (1 << 11, 1 << 14, 1 << 16)
SMALL_CHUNKS = (1 << 6,)


@dataclass(frozen=True)
class PoolShape:
    """How a case sees the buffers: [L, Hkv, N, C, D]."""

    elements: int
    kv_heads: int
    num_chunks: int
    chunk_size: int
    head_dim: int

    @property
    def layers(self) -> int:
        one = self.kv_heads * self.num_chunks * self.chunk_size * self.head_dim
        return self.elements // one

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (self.kv_heads, self.num_chunks, self.chunk_size, self.head_dim)
        return (self.layers, *sizes)

    @classmethod
    def of(cls, case: AttentionCase, chunks: int, small: bool) -> PoolShape:
        """The pool of a case that has `chunks` distinct chunks.

        Raises:
          ValueError: when the buffers have no room for them, or not of this shape.
        """
        elements = SMALL_ELEMENTS if small else MEASURED_ELEMENTS
        for num_chunks in SMALL_CHUNKS if small else MEASURED_CHUNKS:
            shape = cls(elements, case.num_kv_heads, num_chunks, case.chunk_size, case.head_dim)
            if num_chunks >= chunks and math.prod(shape.shape) == elements:
                return shape
        raise ValueError(f"{case.name}: {chunks} chunks do not fit the buffers of {elements}")


class Buffers:
    """The keys and values, random, of one dtype at a time: two dtypes would not fit together."""

    def __init__(self, small: bool, seed: int = 0) -> None:
        self.elements = SMALL_ELEMENTS if small else MEASURED_ELEMENTS
        self._seed = seed
        self._dtype = ""
        self._arrays: tuple = ()

    def get(self, dtype: str) -> tuple[jax.Array, jax.Array]:
        """Keys and values, [elements] each."""
        if dtype != self._dtype:
            self.free()
            self._arrays = tuple(
                random_buffer(jax.random.key(self._seed + index), (self.elements,), dtype)
                for index in range(2)
            )
            jax.block_until_ready(self._arrays)
            self._dtype = dtype
        return self._arrays

    def abstract(self, dtype: str) -> tuple:
        return (jax.ShapeDtypeStruct((self.elements,), jnp.dtype(dtype)),) * 2

    def free(self) -> None:
        for array in self._arrays:
            array.delete()
        self._arrays, self._dtype = (), ""


@partial(jax.jit, static_argnums=(1, 2))
def random_buffer(key, shape: tuple[int, ...], dtype: str):
    """Normal numbers, the same ones again and again: no kernel's time depends on it."""
    elements = math.prod(shape)
    distinct = math.gcd(elements, 1 << 24)
    block = jax.random.normal(key, (distinct,), jnp.float32).astype(dtype)
    return jnp.tile(block, elements // distinct).reshape(shape)
