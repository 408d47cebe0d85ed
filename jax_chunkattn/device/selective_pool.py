"""The chunk pool where queries choose what they read: beside all keys and values, what is known of
each full chunk's keys, and what each row has chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.coded_pool import CodedPool
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.exact_pool import ChunkPool
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.read_counts import ReadCounts
from jax_chunkattn.device.tails import empty
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.plans import HostOrDevice, NewTokens, OwnChunks, PrefillPlan, Reads
from pallas_kernels.selection import ChunkSelector, Landmarks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectivePool:
    """A pool of either kind, with landmarks of its full chunks and the choices of the rows in all
    slots. Landmarks are made once, when a chunk is full, and are everybody's who reads it.

    Letters: L layers, Hkv KV heads, N chunks of C tokens, S slots, K chunks that a query reads.
    """

    AXES: ClassVar[tuple[str, ...]] = ("layers",)
    """What the first dimension of all arrays counts; see `jax_chunkattn.device.logical_axes`."""

    kv: ChunkPool | CodedPool
    landmarks: dict[str, Shaped[Array, "L Hkv N ..."]]
    columns: Int32[Array, "L S K"]  # chunks that a slot's row reads, by their place in its sequence
    selective: Bool[Array, " L"]  # layers whose queries choose
    counts: ReadCounts  # of the call
    selector: ChunkSelector = field(metadata={"static": True})

    @classmethod
    def around(
        cls,
        kv: ChunkPool | CodedPool,
        spec: CacheSpec,
        config: CacheConfig,
        slots: int,
        columns: int,
    ) -> SelectivePool:
        """With nothing chosen yet, for sequences of at most so many chunks."""
        selector, kept = config.selector, config.landmarks
        assert selector is not None, "there is one"
        outer = spec.num_layers, spec.num_kv_heads, kv.num_chunks
        landmarks = empty(kept.arrays(config.chunk_size, spec.head_dim), *outer)
        most = selector.most_read(columns)
        chosen = jnp.zeros((spec.num_layers, slots, most), jnp.int32)
        dense = jnp.array(selector.dense_layers, jnp.int32)
        selective = jnp.ones(spec.num_layers, jnp.bool_).at[dense].set(False)
        # As an array, so that programs do not depend on which layers read everything.
        programmed = replace(selector, dense_layers=())
        counts = ReadCounts.none(spec.num_layers)
        return cls(kv, landmarks, chosen, selective, counts, programmed)

    @property
    def num_chunks(self) -> int:
        return self.kv.num_chunks

    @property
    def chunk_size(self) -> int:
        return self.kv.chunk_size

    @property
    def kept(self) -> Landmarks:
        """What is known of full chunks."""
        return Landmarks.of(self.selector, encoded=isinstance(self.kv, CodedPool))

    def counting_anew(self) -> SelectivePool:
        """With nothing counted yet."""
        return replace(self, counts=ReadCounts.none(self.columns.shape[0]))

    def counted(self, layer: Int32[Array, ""], more: ReadCounts) -> SelectivePool:
        """With what the rows read of a layer at a step."""
        return replace(self, counts=self.counts.plus_layer(layer, more))

    def at_layer(self, layer: Int32[Array, ""]) -> LayerKV:
        """Keys and values of one layer, where they are."""
        return self.kv.at_layer(layer)

    def locate(self, layer: Int32[Array, ""], reads: Reads) -> Reads:
        """What a layer reads: chunks lie where the plan says."""
        return self.kv.locate(layer, reads)

    def write_rows(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        rows: DecodeRows,
    ) -> SelectivePool:
        """With a token of each active row."""
        return replace(self, kv=self.kv.write_rows(layer, k, v, rows))

    def own_chunks(self, rows: DecodeRows) -> OwnChunks | None:
        """The chunks that rows decode in, where they are not in the pool."""
        return self.kv.own_chunks(rows)

    def write_prompts(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        plan: PrefillPlan,
    ) -> tuple[SelectivePool, NewTokens | None]:
        """With the tokens of a prefill call, and landmarks of the chunks that it completes."""
        kv, new = self.kv.write_prompts(layer, k, v, plan)
        sealing = plan.sealing
        assert sealing is not None, "planned for a pool that makes something of full chunks"
        keys = sealing.chunks_of(k.astype(kv.dtype), self.chunk_size)
        made = self.kept.make(jnp.swapaxes(keys, 1, 2))  # M Hkv ...

        def put(array: Array, new: Array) -> Array:
            return array.at[layer, :, sealing.chunks].set(new, mode="drop", unique_indices=True)

        landmarks = jax.tree.map(put, self.landmarks, made)
        return replace(self, kv=kv, landmarks=landmarks), new

    def seal(self, rows: DecodeRows) -> SelectivePool:
        """With landmarks of the chunks that the token just written has filled."""
        kv = self.kv.seal(rows)
        if not self.landmarks:
            return replace(self, kv=kv)

        def seal_row(row: Int32[Array, ""], chunk: Int32[Array, ""], landmarks):
            made = self.kept.make(kv.last_keys(rows.slots[row], chunk))
            return jax.tree.map(
                lambda array, new: array.at[:, :, chunk].set(new, mode="drop"), landmarks, made
            )

        sizes = self.num_chunks, self.chunk_size
        landmarks = rows.for_each_filled(*sizes, seal_row, self.landmarks)
        return replace(self, kv=kv, landmarks=landmarks)

    def write_chunk(
        self,
        chunk: Int32[HostOrDevice, ""],
        position: Int32[HostOrDevice, ""],
        keys: Float[Array, "L Hkv C D"],
        values: Float[Array, "L Hkv C D"],
    ) -> SelectivePool:
        """With a chunk of given keys and values, and its landmarks."""
        kv = self.kv.write_chunk(chunk, position, keys, values)
        made = self.kept.make(keys.astype(kv.dtype))
        landmarks = jax.tree.map(
            lambda array, new: array.at[:, :, chunk].set(new, mode="drop"), self.landmarks, made
        )
        return replace(self, kv=kv, landmarks=landmarks)

    @property
    def chunks(self) -> ChunkArrays:
        """What is kept of full chunks, and what is known of them."""
        return ChunkArrays((self.kv.chunks.of_heads, self.landmarks))

    def with_chunks(self, chunks: ChunkArrays) -> SelectivePool:
        """With these arrays of chunks."""
        kv, landmarks = chunks.of_heads
        return replace(self, kv=self.kv.with_chunks(ChunkArrays(kv)), landmarks=landmarks)

    def choices(self, layer: Int32[Array, ""], slots: Int32[Array, " B"]) -> Int32[Array, "B K"]:
        """What the rows in these slots have chosen."""
        return self.columns.at[layer, slots].get(mode="fill", fill_value=0)

    def with_choices(
        self, layer: Int32[Array, ""], slots: Int32[Array, " B"], columns: Int32[Array, "B K"]
    ) -> SelectivePool:
        """With what the rows in these slots have chosen now; slot S drops a row's."""
        chosen = self.columns.at[layer, slots].set(columns, mode="drop")
        return replace(self, columns=chosen)
