"""Full chunks between the pool and the host: the programs, and what a chunk is in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.pool import (
    ChunkPool,
    ClusteredPool,
    CodedPool,
    SelectivePool,
    WindowPool,
)
from jax_chunkattn.device.request_table import DeviceState
from pallas_kernels.plans import HostOrDevice

TRANSFER_SIZES = (8, 1)
"""Chunks that a call moves."""


def read_chunks(state: DeviceState, chunks: Int32[HostOrDevice, " M"]) -> ChunkArrays:
    """What the pool keeps of these chunks."""
    return _pool(state).chunks.take(chunks)


def write_chunks(
    state: DeviceState, chunks: Int32[HostOrDevice, " M"], new: ChunkArrays
) -> DeviceState:
    """With these chunks as they were read; chunk N drops one."""
    pool = _pool(state)
    return replace(state, pool=pool.with_chunks(pool.chunks.put(chunks, new)))


def _pool(state: DeviceState) -> ChunkPool | ClusteredPool | CodedPool | SelectivePool:
    pool = state.pool
    assert not isinstance(pool, WindowPool), "chunks of heads with windows have other ids"
    return pool


def in_calls(count: int) -> list[slice]:
    """Which of so many chunks each call moves."""
    parts, begin = [], 0
    for size in TRANSFER_SIZES:
        while begin + size <= count:
            parts.append(slice(begin, begin + size))
            begin += size
    return parts


@dataclass(frozen=True)
class ChunkLayout:
    """What is kept of one chunk: arrays, and the same one behind another as bytes.

    Attributes:
      arrays: of one chunk, each with the dimension that counts chunks in a pool, first to last as
        they stand in the bytes.
      treedef: of `ChunkArrays`.
    """

    arrays: tuple[tuple[tuple[int, ...], np.dtype, int], ...]  # shape, dtype, dimension
    treedef: Any

    @classmethod
    def of(cls, pool: ChunkArrays) -> ChunkLayout:
        """Of what a pool keeps, which may be shapes alone."""
        arrays = []
        for axis, tree in ((2, pool.of_heads), (1, pool.others)):
            for one in jax.tree.leaves(tree):
                shape = (*one.shape[:axis], *one.shape[axis + 1 :])
                arrays.append((shape, np.dtype(one.dtype), axis))
        return cls(tuple(arrays), jax.tree.structure(pool))

    @property
    def chunk_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.arrays)

    @property
    def parts(self) -> list[tuple[list[int], str]]:
        """Shapes and dtypes, to be compared with those of another process."""
        return [(list(shape), str(dtype)) for shape, dtype, _ in self.arrays]

    def pack(self, read: ChunkArrays, index: int) -> np.ndarray:
        """The bytes of one of the chunks that were read, uint8."""
        packed, begin = np.empty(self.chunk_bytes, np.uint8), 0
        leaves = jax.tree.leaves(read)
        for array, (shape, dtype, axis) in zip(leaves, self.arrays, strict=True):
            end = begin + math.prod(shape) * dtype.itemsize
            place = packed[begin:end].view(dtype).reshape(shape)
            np.copyto(place, np.take(np.asarray(array), index, axis=axis))
            begin = end
        return packed

    def unpack(self, chunks: Sequence[np.ndarray]) -> ChunkArrays:
        """Arrays of the chunks that these bytes are, to be written."""
        leaves, begin = [], 0
        for shape, dtype, axis in self.arrays:
            end = begin + math.prod(shape) * dtype.itemsize
            parts = [chunk[begin:end].view(dtype).reshape(shape) for chunk in chunks]
            leaves.append(np.stack(parts, axis=axis))
            begin = end
        return jax.tree.unflatten(self.treedef, leaves)
