"""The chunk pool where full chunks are encoded: codes, and the exact last chunk of each row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.tails import as_kept, copied, empty, written
from pallas_kernels.codecs import ChunkCodec, ChunkContext, Constants, TensorCodec
from pallas_kernels.coded_kv import CodedKV, Encoded
from pallas_kernels.plans import HostOrDevice, NewTokens, OwnChunks, PrefillPlan, Reads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodedPool:
    """Codes of full chunks of all layers, and an exact tail for each slot of the request table.

    A chunk is encoded once: by the step that fills a row's tail, or by the prefill call that has
    computed all of it, from exact numbers either time.
    """

    AXES: ClassVar[tuple[str, ...]] = ("layers", "kv_heads")
    """What the first dimensions of all arrays count; see `jax_chunkattn.device.logical_axes`."""

    keys: Encoded  # L Hkv N ...
    values: Encoded
    tail_keys: Float[Array, "L Hkv S C D"]
    tail_values: Float[Array, "L Hkv S C D"]
    codec: ChunkCodec = field(metadata={"static": True})
    key_constants: Constants = field(default_factory=dict)  # L Hkv n
    value_constants: Constants = field(default_factory=dict)

    @classmethod
    def allocate(cls, spec: CacheSpec, config: CacheConfig, num_slots: int) -> CodedPool:
        """A pool of zeros on the default device.

        Raises:
          ValueError: for chunks that are not to be encoded, or that the codec cannot store.
        """
        codec, size = config.chunk_codec, config.chunk_size
        if codec is None:
            raise ValueError("the chunks of this pool are not encoded")
        num_chunks = config.chunks_for(spec, num_slots)
        outer = spec.num_layers, spec.num_kv_heads

        def zeros(part: TensorCodec) -> Encoded:
            return empty(part.arrays(size, spec.head_dim), *outer, num_chunks)

        tails = (*outer, num_slots, size, spec.head_dim)
        return cls(
            zeros(codec.keys),
            zeros(codec.values),
            jnp.zeros(tails, config.dtype),
            jnp.zeros(tails, config.dtype),
            codec,
            jax.tree.map(jnp.asarray, dict(codec.constants.keys)),
            jax.tree.map(jnp.asarray, dict(codec.constants.values)),
        )

    @property
    def dtype(self) -> jnp.dtype:
        return self.tail_keys.dtype

    @property
    def num_chunks(self) -> int:
        return next(iter(self.keys.values())).shape[2]

    @property
    def num_slots(self) -> int:
        return self.tail_keys.shape[2]

    @property
    def chunk_size(self) -> int:
        return self.tail_keys.shape[3]

    def at_layer(self, layer: Int32[Array, ""]) -> CodedKV:
        """Codes of one layer, where they are."""
        sizes = self.chunk_size, self.tail_keys.shape[4]
        constants = self.key_constants, self.value_constants
        return CodedKV(self.keys, self.values, layer, self.codec, *sizes, *constants)

    def locate(self, layer: Int32[Array, ""], reads: Reads) -> Reads:
        """What a layer reads: chunks lie where the plan says."""
        return reads

    def write_rows(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        rows: DecodeRows,
    ) -> CodedPool:
        """With a token of each active row in its tail."""
        slots, offsets = rows.place_in_tails(self.num_slots, self.num_chunks, self.chunk_size)
        return self._write_tails(layer, *as_kept(k, v, self.dtype), slots, offsets)

    def own_chunks(self, rows: DecodeRows) -> OwnChunks:
        """The chunks that rows decode in."""
        return OwnChunks(self.tail_keys, self.tail_values, rows.slots)

    def write_prompts(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        plan: PrefillPlan,
    ) -> tuple[CodedPool, NewTokens]:
        """With the chunks that a prefill call completes, and the tails that it begins; and the
        call's tokens, as they are read by those of the same chunk."""
        sealing = plan.sealing
        assert sealing is not None, "planned for a pool that encodes"
        k, v = as_kept(k, v, self.dtype)
        keys, values = (sealing.chunks_of(tokens, self.chunk_size) for tokens in (k, v))
        coded = self.at_layer(layer).write(keys, values, sealing.chunks, sealing.positions)
        pool = replace(self, keys=coded.keys, values=coded.values)
        pool = pool._write_tails(layer, k, v, sealing.tail_slots, plan.write_offsets)
        return pool, NewTokens(k, v)

    def last_keys(
        self, slot: Int32[Array, ""], chunk: Int32[Array, ""]
    ) -> Float[Array, "L Hkv C D"]:
        """Exact keys of the chunk that the row in a slot has just filled."""
        return self.tail_keys.at[:, :, slot].get(mode="clip")

    def seal(self, rows: DecodeRows) -> CodedPool:
        """With the tails that the token just written has filled encoded, each into its chunk."""

        def seal_row(
            row: Int32[Array, ""], chunk: Int32[Array, ""], codes: tuple[Encoded, Encoded]
        ) -> tuple[Encoded, Encoded]:
            begin = rows.lengths[row] + 1 - self.chunk_size
            tails = (
                lax.dynamic_index_in_dim(tails, rows.slots[row], 2, keepdims=False)
                for tails in (self.tail_keys, self.tail_values)
            )
            return self._encoded_in(codes, chunk, begin, *tails)

        sizes = self.num_chunks, self.chunk_size
        keys, values = rows.for_each_filled(*sizes, seal_row, (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def write_chunk(
        self,
        chunk: Int32[HostOrDevice, ""],
        position: Int32[HostOrDevice, ""],
        keys: Float[Array, "L Hkv C D"],
        values: Float[Array, "L Hkv C D"],
    ) -> CodedPool:
        """With a chunk of given keys and values encoded, as one that begins at a position."""
        codes, kept = (self.keys, self.values), as_kept(keys, values, self.dtype)
        encoded = self._encoded_in(codes, jnp.asarray(chunk), jnp.asarray(position), *kept)
        return replace(self, keys=encoded[0], values=encoded[1])

    @property
    def chunks(self) -> ChunkArrays:
        """What is kept of full chunks, encoded."""
        return ChunkArrays((self.keys, self.values))

    def with_chunks(self, chunks: ChunkArrays) -> CodedPool:
        """With these arrays of chunks."""
        keys, values = chunks.of_heads
        return replace(self, keys=keys, values=values)

    def copy_tails(
        self, sources: Int32[HostOrDevice, " M"], destinations: Int32[HostOrDevice, " M"]
    ) -> CodedPool:
        """With slots' tails copied; all are read before any is written. Slot S drops one."""
        keys, values = copied((self.tail_keys, self.tail_values), sources, destinations)
        return replace(self, tail_keys=keys, tail_values=values)

    def _encoded_in(
        self,
        codes: tuple[Encoded, Encoded],
        chunk: Int32[Array, ""],
        begin: Int32[Array, ""],
        keys: Float[Array, "L Hkv C D"],
        values: Float[Array, "L Hkv C D"],
    ) -> tuple[Encoded, Encoded]:
        """Codes of all chunks, with those of one whose tokens begin at a position."""
        begins = jnp.broadcast_to(begin, keys.shape[:2])

        def put(part: TensorCodec, encoded: Encoded, exact: Array, constants: Constants) -> Encoded:
            arrays = part.encode(exact, ChunkContext(begins, constants))
            return jax.tree.map(
                lambda array, codes: array.at[:, :, chunk].set(codes, mode="drop"),
                encoded,
                arrays,
            )

        return (
            put(self.codec.keys, codes[0], keys, self.key_constants),
            put(self.codec.values, codes[1], values, self.value_constants),
        )

    def _write_tails(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        slots: Int32[HostOrDevice, " T"],
        offsets: Int32[HostOrDevice, " T"],
    ) -> CodedPool:
        tails = self.tail_keys, self.tail_values
        keys, values = written(tails, (k, v), layer, slots, offsets)
        return replace(self, tail_keys=keys, tail_values=values)
