"""The chunk pool where heads with windows have chunks of their own, fewer than the others.

A plan names a chunk by its id for the heads that go by it (`tree.window_room`). Here all heads'
chunks lie one behind another in one array, so that a kernel reads it as a pool of one layer: before
a layer reads, ids become places in that array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.exact_pool import ChunkPool
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.tree.window_room import WindowRoom
from pallas_kernels.plans import HostOrDevice, PrefillPlan, Reads
from pallas_kernels.stored_kv import StoredKV


@dataclass(frozen=True)
class HeadPlaces:
    """Where the chunks of each KV head of each layer lie in arrays [Hkv, X] of chunks.

    Letters: L layers, Hkv KV heads.

    Attributes:
      windowed: whether a head has a window, L x Hkv.
      begins: the head's first chunk, L x Hkv.
      num_chunks: of heads without a window, N; and of those with one, M.
      total: X, of the head number that has most.
    """

    windowed: tuple[tuple[bool, ...], ...]
    begins: tuple[tuple[int, ...], ...]
    num_chunks: tuple[int, int]
    total: int

    @classmethod
    def of(cls, spec: CacheSpec, num_chunks: int, windowed_chunks: int) -> HeadPlaces:
        """Of a model's heads, those of one number in all layers one behind another."""
        windowed = [[window is not None for window in layer] for layer in spec.windows_of_heads]
        sizes = np.where(windowed, windowed_chunks, num_chunks)
        ends = sizes.cumsum(axis=0)
        return cls(
            _tuples(windowed),
            _tuples((ends - sizes).tolist()),
            (num_chunks, windowed_chunks),
            int(ends[-1].max()),
        )

    @property
    def by_layer(self) -> bool:
        """Whether all heads of a layer have a window, or none has."""
        return all(len(set(layer)) == 1 for layer in self.windowed)

    def find(
        self, layer: Int32[Array, ""], ids: Int32[HostOrDevice, "Hkv ..."]
    ) -> Int32[Array, "Hkv ..."]:
        """Where the chunks of these ids lie, of each head of a layer; X for those that are
        nowhere."""
        heads = (-1,) + (1,) * (ids.ndim - 1)
        begin, size = (of_head.reshape(heads) for of_head in self._of_layer(layer))
        return jnp.where(ids < size, ids + begin, self.total)

    def find_alike(
        self, layer: Int32[Array, ""], ids: Int32[HostOrDevice, "*ids"]
    ) -> Int32[Array, "*ids"]:
        """The same of every head of a layer, where heads are `by_layer`."""
        begin, size = (of_head[0] for of_head in self._of_layer(layer))
        return jnp.where(ids < size, ids + begin, self.total)

    def find_in_all(
        self, full: Int32[HostOrDevice, " M"], windowed: Int32[HostOrDevice, " M"]
    ) -> Int32[Array, "Hkv LM"]:
        """The same of all layers, of chunks without a window and with one."""
        has = np.array(self.windowed)[..., None]
        ids = jnp.where(has, windowed, full)  # L Hkv M
        size = np.where(has, self.num_chunks[1], self.num_chunks[0]).astype(np.int32)
        begins = np.array(self.begins, np.int32)[..., None]
        places = jnp.where(ids < size, ids + begins, self.total)
        return jnp.moveaxis(places, 0, 1).reshape(places.shape[1], -1)

    def _of_layer(
        self, layer: Int32[Array, ""]
    ) -> tuple[Int32[Array, " Hkv"], Int32[Array, " Hkv"]]:
        """Where each head of a layer begins, and its chunks."""
        full, windowed = self.num_chunks
        sizes = np.where(self.windowed, windowed, full)
        begins, sizes = (jnp.asarray(table, jnp.int32) for table in (self.begins, sizes))
        return begins[layer], sizes[layer]


def _tuples(rows: Sequence[Sequence]) -> tuple:
    return tuple(map(tuple, rows))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowPool:
    """Keys and values of all layers, where heads without a window have N chunks and the others M.

    Letters: Hkv KV heads, X chunks of all layers of a head, W windows.
    """

    AXES: ClassVar[tuple[str, ...]] = ChunkPool.AXES
    """What the dimensions of both arrays count: there is one layer, of all layers' chunks."""

    kv: ChunkPool  # 1 Hkv X C D
    spec: CacheSpec = field(metadata={"static": True})
    places: HeadPlaces = field(metadata={"static": True})

    @classmethod
    def allocate(cls, spec: CacheSpec, config: CacheConfig, room: WindowRoom) -> WindowPool:
        """A pool of zeros on the default device."""
        places = HeadPlaces.of(spec, config.chunks_for(spec), room.chunks)
        shape = (1, spec.num_kv_heads, places.total, config.chunk_size, spec.head_dim)
        kv = ChunkPool(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        return cls(kv, spec, places)

    @property
    def num_chunks(self) -> int:
        """Of heads without a window."""
        return self.places.num_chunks[0]

    @property
    def chunk_size(self) -> int:
        return self.kv.chunk_size

    def at_layer(self, layer: Int32[Array, ""]) -> StoredKV:
        """Keys and values of all layers, which `locate` finds those of one among."""
        return self.kv.at_layer(jnp.zeros_like(layer))

    def locate(self, layer: Int32[Array, ""], reads: Reads) -> Reads:
        """What a layer reads, with chunks named by where they lie."""
        plan = reads.plan
        if self.places.by_layer:
            found = plan.with_chunks(lambda ids: self.places.find_alike(layer, ids))
            return replace(reads, plan=found)
        of_heads = plan.of_windows(self._windows(layer))
        found = of_heads.with_chunks(lambda ids: self.places.find(layer, ids))
        heads = jnp.arange(self.spec.num_kv_heads, dtype=jnp.int32)
        return replace(reads, plan=found, head_windows=heads)

    def write_rows(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        rows: DecodeRows,
    ) -> WindowPool:
        """With a token of each active row in its last chunks."""
        chunks, offsets = rows.place_by_window(self.num_chunks, self.chunk_size)
        return self._write(layer, k, v, chunks, offsets[0])

    def own_chunks(self, rows: DecodeRows) -> None:
        """Rows read all their chunks in the pool."""

    def write_prompts(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        plan: PrefillPlan,
    ) -> tuple[WindowPool, None]:
        """With the tokens of a prefill call, which are read in the pool."""
        chunks, offsets = jnp.asarray(plan.write_chunks), plan.write_offsets
        return self._write(layer, k, v, chunks, offsets), None

    def seal(self, rows: DecodeRows) -> WindowPool:
        """A full chunk stays as it was written."""
        return self

    def copy(
        self,
        sources: Int32[HostOrDevice, " M"],
        destinations: Int32[HostOrDevice, " M"],
        windowed: tuple[Int32[HostOrDevice, " M"], Int32[HostOrDevice, " M"]],
    ) -> WindowPool:
        """With chunks copied, all layers of them, for the heads without a window, and others for
        those with one; all are read before any is written."""
        of = self.places.find_in_all(sources, windowed[0])
        to = self.places.find_in_all(destinations, windowed[1])
        heads = jnp.arange(len(of), dtype=jnp.int32)[:, None]

        def copied(array: Array) -> Array:
            return array.at[0, heads, to].set(array[0, heads, of], mode="drop")

        return replace(self, kv=jax.tree.map(copied, self.kv))

    def _windows(self, layer: Int32[Array, ""]) -> Int32[Array, " Hkv"]:
        windows = self.spec.head_windows(layer)
        assert windows is not None, "heads have windows"
        return windows

    def _write(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        chunks: Int32[Array, "W T"],
        offsets: Int32[HostOrDevice, " T"],
    ) -> WindowPool:
        places = self.places.find(layer, chunks[self._windows(layer)])
        stored = self.at_layer(layer).write_by_head(k, v, places, offsets)
        return replace(self, kv=ChunkPool(stored.keys, stored.values))
