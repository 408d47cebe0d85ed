"""Keys of clusters and values of heads, as the pool stores them: how chunks are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.clusters.head_clusters import KeySlots
from pallas_kernels.codecs import ChunkCodec, TensorCodec
from pallas_kernels.plans import HostOrDevice


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClusteredKV:
    """Keys and values of one layer, of which heads of a cluster have their keys in common.

    A chunk says itself which head attends for each, and which slot its keys are in: all chunks of a
    sequence say the same.
    Attention takes it for a pool of one KV head for each query head.

    Letters: L layers, Hq query heads, Hkv KV heads, K slots of all layers, N chunks of C tokens,
    D numbers of a head.

    Attributes:
      keys, values: as they are, or with a codec what it stores of each chunk, by name.
    """

    keys: Any  # K N C D, or with a codec arrays K N ... by name
    values: Any  # L Hkv N C D, or the same
    representatives: UInt8[Array, "L N Hq"]
    head_slots: UInt8[Array, "L N Hq"]
    layer: int | Int32[Array, ""]  # may be traced
    slots: KeySlots = field(metadata={"static": True})
    codec: ChunkCodec | None = field(default=None, metadata={"static": True})
    coded_sizes: tuple[int, int] = field(default=(0, 0), metadata={"static": True})  # C, D

    @property
    def dtype(self) -> jnp.dtype:
        """Of numbers as they are, or what codes are decoded to."""
        return self.values.dtype if self.codec is None else jnp.dtype(jnp.float32)

    @property
    def kv_heads(self) -> int:
        """As attention sees it: Hq."""
        return self.slots.heads.query_heads

    @property
    def num_chunks(self) -> int:
        return self.representatives.shape[1]

    @property
    def chunk_size(self) -> int:
        return self.values.shape[3] if self.codec is None else self.coded_sizes[0]

    @property
    def head_dim(self) -> int:
        return self.values.shape[4] if self.codec is None else self.coded_sizes[1]

    def layer_operand(self) -> Int32[Array, " 1"]:
        """The layer, as Pallas kernels take it."""
        return jnp.asarray(self.layer, jnp.int32).reshape(1)

    def begin_operand(self) -> Int32[Array, " 1"]:
        """The layer's first slot, as Pallas kernels take it."""
        return self._begin().reshape(1)

    def all_keys(self) -> Float[Array, "Hq N C D"]:
        """Keys of every chunk."""
        chunk = jnp.arange(self.num_chunks, dtype=jnp.int32)
        place = self._begin() + self.head_slots[self.layer].astype(jnp.int32)
        keys = jax.tree.map(lambda array: array[place.T, chunk[None]], self.keys)
        return self._numbers(self._key_codec, keys)

    def all_values(self) -> Float[Array, "Hq N C D"]:
        """Values of every chunk."""
        values = jax.tree.map(lambda array: array[self.layer], self.values)
        values = self._numbers(self._value_codec, values)
        return jnp.repeat(values, self.slots.heads.group, axis=0)

    def gather(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> tuple[Float32[Array, "*rows tokens D"], Float32[Array, "*rows tokens D"]]:
        """Keys and values of one head, of the W * C tokens of these chunks, which must be there."""
        kv_head = head // self.slots.heads.group
        return self.gather_keys(head, chunk_ids), self.gather_values(kv_head, chunk_ids)

    def gather_keys(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> Float32[Array, "*rows tokens D"]:
        """The keys alone."""
        slot = self.head_slots.at[self.layer, chunk_ids, head].get(mode="promise_in_bounds")
        place = self._begin() + slot.astype(jnp.int32)

        def of_chunks(array: Array) -> Array:
            return array.at[place, chunk_ids].get(mode="promise_in_bounds")

        return self._flat(self._key_codec, jax.tree.map(of_chunks, self.keys))

    def gather_values(
        self, kv_head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> Float32[Array, "*rows tokens D"]:
        """The values alone, of a KV head as they are stored."""

        def of_chunks(array: Array) -> Array:
            return array.at[self.layer, kv_head, chunk_ids].get(mode="promise_in_bounds")

        return self._flat(self._value_codec, jax.tree.map(of_chunks, self.values))

    def representatives_of(self, chunk: Int32[HostOrDevice, ""]) -> Int32[Array, " Hq"]:
        """For each query head the one that attends for its cluster, where a chunk is read."""
        found = self.representatives.at[self.layer, chunk].get(mode="clip")
        return found.astype(jnp.int32)

    @property
    def _key_codec(self) -> TensorCodec | None:
        return None if self.codec is None else self.codec.keys

    @property
    def _value_codec(self) -> TensorCodec | None:
        return None if self.codec is None else self.codec.values

    def _begin(self) -> Int32[Array, ""]:
        return jnp.asarray(self.slots.begins, jnp.int32)[self.layer]

    def _flat(self, codec: TensorCodec | None, chunks: Any) -> Float32[Array, "*rows tokens D"]:
        numbers = self._numbers(codec, chunks)
        return numbers.reshape(*numbers.shape[:-3], -1, self.head_dim).astype(jnp.float32)

    @staticmethod
    def _numbers(codec: TensorCodec | None, chunks: Any) -> Float[Array, "*chunks C D"]:
        """Of chunks as they are stored."""
        return chunks if codec is None else codec.decode(chunks)
