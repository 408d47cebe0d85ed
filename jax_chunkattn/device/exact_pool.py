"""The chunk pool where chunks are stored as they are: arrays of every chunk of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.model_interface import CacheSpec
from pallas_kernels.plans import HostOrDevice, PrefillPlan, Reads
from pallas_kernels.pool_writes import put_slots
from pallas_kernels.stored_kv import StoredKV


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkPool:
    """Keys and values of all layers, head-major: one head's chunk is a contiguous [C, D] tile."""

    AXES: ClassVar[tuple[str, ...]] = ("layers", "kv_heads", "chunks", "chunk_tokens", "head_dim")
    """What the dimensions of both arrays count; see `jax_chunkattn.device.logical_axes`."""

    keys: Float[Array, "L Hkv N C D"]
    values: Float[Array, "L Hkv N C D"]

    def at_layer(self, layer: Int32[Array, ""]) -> StoredKV:
        """Keys and values of one layer, where they are."""
        return StoredKV(self.keys, self.values, layer)

    def locate(self, layer: Int32[Array, ""], reads: Reads) -> Reads:
        """What a layer reads: chunks lie where the plan says."""
        return reads

    @property
    def dtype(self) -> jnp.dtype:
        return self.keys.dtype

    @property
    def num_chunks(self) -> int:
        return self.keys.shape[2]

    @property
    def chunk_size(self) -> int:
        return self.keys.shape[3]

    def write_rows(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        rows: DecodeRows,
    ) -> ChunkPool:
        """With a token of each active row in its last chunk."""
        chunks, offsets = rows.place(self.num_chunks, self.chunk_size)
        stored = self.at_layer(layer).write(k, v, chunks, offsets)
        return ChunkPool(stored.keys, stored.values)

    def own_chunks(self, rows: DecodeRows) -> None:
        """Rows read all their chunks in the pool."""

    def write_prompts(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        plan: PrefillPlan,
    ) -> tuple[ChunkPool, None]:
        """With the tokens of a prefill call, which are read in the pool."""
        stored = self.at_layer(layer).write(k, v, plan.write_chunks, plan.write_offsets)
        return ChunkPool(stored.keys, stored.values), None

    def last_keys(
        self, slot: Int32[Array, ""], chunk: Int32[Array, ""]
    ) -> Float[Array, "L Hkv C D"]:
        """Keys of the chunk that the row in a slot has just filled."""
        return self.keys.at[:, :, chunk].get(mode="clip")

    def seal(self, rows: DecodeRows) -> ChunkPool:
        """A full chunk stays as it was written."""
        return self

    def write_chunk(
        self,
        chunk: Int32[HostOrDevice, ""],
        position: Int32[HostOrDevice, ""],
        keys: Float[Array, "L Hkv C D"],
        values: Float[Array, "L Hkv C D"],
    ) -> ChunkPool:
        """With a chunk of given keys and values, whatever their position in a sequence."""
        finite = jnp.nan_to_num(values.astype(self.dtype))
        at = jnp.asarray(chunk)[None]
        return ChunkPool(
            put_slots(self.keys, keys.astype(self.dtype)[:, :, None], at, axis=2),
            put_slots(self.values, finite[:, :, None], at, axis=2),
        )

    @property
    def chunks(self) -> ChunkArrays:
        """What is kept of chunks."""
        return ChunkArrays((self.keys, self.values))

    def with_chunks(self, chunks: ChunkArrays) -> ChunkPool:
        """With these arrays of chunks."""
        return ChunkPool(*chunks.of_heads)


def allocate_pool(spec: CacheSpec, config: CacheConfig) -> ChunkPool:
    """A pool of zeros on the default device, of chunks that are stored as they are.

    Raises:
      ValueError: for a config with a codec.
    """
    if config.chunk_codec is not None:
        raise ValueError(f"this pool stores chunks as they are, not encoded by {config.codec_name}")
    shape = (
        spec.num_layers,
        spec.num_kv_heads,
        config.chunks_for(spec),
        config.chunk_size,
        spec.head_dim,
    )
    return ChunkPool(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
