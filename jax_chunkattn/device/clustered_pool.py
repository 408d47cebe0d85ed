"""The chunk pool where heads that attend alike have their keys in common (CHAI)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.tails import as_kept, copied, empty, written
from pallas_kernels.clusters import ClusteredKV, HeadClusters, KeySlots, representatives_of
from pallas_kernels.codecs import ChunkCodec, TensorCodec
from pallas_kernels.plans import HostOrDevice, NewTokens, OwnChunks, PrefillPlan, Reads, Sealing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClusteredPool:
    """Keys of clusters and values of heads of full chunks, and for each slot of the request table a
    tail: the chunk that its row's last token lies in.

    Which head attends for its cluster is kept with each chunk of a sequence: found for the first
    one when it is full, it holds for all behind it. A tail has keys and values of every query head,
    as that reads them: in a first chunk its own, behind it those of its cluster's representative.

    Letters: L layers, Hq query heads, Hkv KV heads, K key slots of all layers, N chunks of C
    tokens, S slots of the table, D numbers of a head.

    Attributes:
      keys, values: of full chunks, as they are or with a codec what it stores of each, by name.
    """

    AXES: ClassVar[tuple[str, ...]] = ()
    """No dimension is split over devices: heads of one cluster may be anywhere."""

    keys: Any  # K N C D, or with a codec arrays K N ... by name
    values: Any  # L Hkv N C D, or the same
    representatives: UInt8[Array, "L N Hq"]
    head_slots: UInt8[Array, "L N Hq"]  # of the layer's key slots, where a head's keys are
    tail_queries: Float[Array, "L Hq S C D"]  # of first chunks
    tail_keys: Float[Array, "L Hq S C D"]
    tail_values: Float[Array, "L Hq S C D"]
    clusters: HeadClusters = field(metadata={"static": True})
    spec: CacheSpec = field(metadata={"static": True})
    codec: ChunkCodec | None = field(default=None, metadata={"static": True})

    @classmethod
    def allocate(cls, spec: CacheSpec, config: CacheConfig, num_slots: int) -> ClusteredPool:
        """A pool of zeros on the default device.

        Raises:
          ValueError: for a config without clusters.
        """
        clusters, size, dtype = config.clusters, config.chunk_size, config.dtype
        if clusters is None:
            raise ValueError("heads of this pool form no clusters")
        heads = spec.attention.heads
        num_chunks = config.chunks_for(spec, num_slots)
        chunk, maps = (size, spec.head_dim), (spec.num_layers, num_chunks, heads.query_heads)
        tails = (spec.num_layers, heads.query_heads, num_slots, *chunk)
        codec = config.chunk_codec

        def zeros(part: TensorCodec | None, *outer: int) -> Any:
            if part is None:
                return jnp.zeros((*outer, num_chunks, *chunk), dtype)
            return empty(part.arrays(*chunk), *outer, num_chunks)

        return cls(
            zeros(codec and codec.keys, KeySlots.of(clusters, heads).total),
            zeros(codec and codec.values, spec.num_layers, heads.kv_heads),
            jnp.zeros(maps, jnp.uint8),
            jnp.zeros(maps, jnp.uint8),
            jnp.zeros(tails, dtype),
            jnp.zeros(tails, dtype),
            jnp.zeros(tails, dtype),
            clusters,
            spec,
            codec,
        )

    @property
    def dtype(self) -> jnp.dtype:
        return self.tail_values.dtype

    @property
    def num_chunks(self) -> int:
        return self.representatives.shape[1]

    @property
    def num_slots(self) -> int:
        return self.tail_keys.shape[2]

    @property
    def chunk_size(self) -> int:
        return self.tail_values.shape[3]

    @property
    def slots(self) -> KeySlots:
        """Where keys are."""
        return KeySlots.of(self.clusters, self.spec.attention.heads)

    def at_layer(self, layer: Int32[Array, ""]) -> ClusteredKV:
        """Keys and values of one layer, where they are."""
        maps = self.representatives, self.head_slots
        sizes = self.chunk_size, self.tail_values.shape[4]
        return ClusteredKV(self.keys, self.values, *maps, layer, self.slots, self.codec, sizes)

    def locate(self, layer: Int32[Array, ""], reads: Reads) -> Reads:
        """What a layer reads: chunks lie where the plan says."""
        return reads

    def read_by(
        self, layer: Int32[Array, ""], first_chunks: Int32[Array, " R"]
    ) -> Int32[Array, "R Hq"]:
        """The head that attends for each query head's cluster, in sequences that begin with these
        chunks; each for itself where that is chunk N, nowhere."""
        heads = self.spec.attention.heads.query_heads
        found = self.representatives.at[layer, first_chunks].get(mode="clip").astype(jnp.int32)
        itself = jnp.arange(heads, dtype=jnp.int32)[None]
        return jnp.where((first_chunks < self.num_chunks)[:, None], found, itself)

    def with_sealed_maps(
        self,
        layer: Int32[Array, ""],
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        sealing: Sealing,
        first_chunks: Int32[Array, " M"],
    ) -> ClusteredPool:
        """With the maps of all chunks that a prefill call completes: found for first chunks, for
        others as the first one of their sequence has it."""
        size = self.chunk_size
        begin, chunks = jnp.asarray(sealing.begin), jnp.asarray(sealing.chunks)
        is_first = (jnp.asarray(sealing.positions) == 0) & (chunks < self.num_chunks)
        count = jnp.asarray(self.clusters.counts, jnp.int32)[layer]
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        order = jnp.argsort(~is_first)  # those first

        def find(index: Int32[Array, ""], pool: ClusteredPool) -> ClusteredPool:
            which = order[index]
            queries = lax.dynamic_slice_in_dim(q, begin[which], size)
            keys = lax.dynamic_slice_in_dim(k, begin[which], size)
            found = self._clustered(queries, keys, count, layer)
            return pool._with_maps(layer, chunks[which], found)

        pool = self
        if len(q) >= size:  # else it can complete none
            pool = lax.fori_loop(0, is_first.sum(dtype=jnp.int32), find, self)
        return pool._with_maps(layer, chunks, pool.read_by(layer, first_chunks))

    def write_rows(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "B Hq D"],
        v: Float[Array, "B Hq D"],
        rows: DecodeRows,
    ) -> ClusteredPool:
        """With a token of each active row in its tail, keys and values as query heads read them."""
        slots, offsets = rows.place_in_tails(self.num_slots, self.num_chunks, self.chunk_size)
        return self._write_tails(layer, *as_kept(k, v, self.dtype), slots, offsets)

    def write_queries(
        self,
        layer: Int32[Array, ""],
        q: Float[Array, "T Hq D"],
        slots: Int32[HostOrDevice, " T"],
        offsets: Int32[HostOrDevice, " T"],
    ) -> ClusteredPool:
        """With queries of tokens in first chunks, by which heads will be clustered."""
        return replace(self, tail_queries=written(self.tail_queries, q, layer, slots, offsets))

    def own_chunks(self, rows: DecodeRows) -> OwnChunks:
        """The chunks that rows decode in."""
        return OwnChunks(self.tail_keys, self.tail_values, rows.slots)

    def write_prompts(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hq D"],
        v: Float[Array, "T Hq D"],
        plan: PrefillPlan,
    ) -> tuple[ClusteredPool, NewTokens]:
        """With the chunks that a prefill call completes, whose maps are there, and the tails that
        it begins; and the call's tokens, as they are read by those of the same chunk."""
        sealing, group = plan.sealing, self.spec.attention.heads.group
        assert sealing is not None, "planned for a pool that makes something of full chunks"
        k, v = as_kept(k, v, self.dtype)
        chunks = jnp.asarray(sealing.chunks)
        maps = self.representatives.at[layer, chunks].get(mode="clip").astype(jnp.int32)
        kept = self.slots.kept(maps)  # M S
        keys = sealing.chunks_of(k, self.chunk_size)  # M C Hq D
        keys = jnp.take_along_axis(keys, kept[:, None, :, None], axis=2)
        values = sealing.chunks_of(v[:, ::group], self.chunk_size)
        places = self.slots.places(layer)[None]

        def put_keys(array: Array, new: Array) -> Array:
            return array.at[places, chunks[:, None]].set(new, mode="drop", unique_indices=True)

        def put_values(array: Array, new: Array) -> Array:
            return array.at[layer, :, chunks].set(new, mode="drop", unique_indices=True)

        keys, values = self._stored(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))
        pool = replace(
            self,
            keys=jax.tree.map(put_keys, self.keys, keys),
            values=jax.tree.map(put_values, self.values, values),
        )
        pool = pool._write_tails(layer, k, v, sealing.tail_slots, plan.write_offsets)
        return pool, NewTokens(k, v)

    def seal(self, rows: DecodeRows) -> ClusteredPool:
        """With the tails that the token just written has filled in their chunks."""
        tables = rows.plan.tables
        assert tables is not None, "planned with the rows' tables"
        layers = jnp.arange(len(self.tail_values), dtype=jnp.int32)
        counts = jnp.asarray(self.clusters.counts, jnp.int32)
        places = jax.vmap(self.slots.places)(layers)  # L S
        group = self.spec.attention.heads.group

        def seal_row(
            row: Int32[Array, ""], chunk: Int32[Array, ""], pool: ClusteredPool
        ) -> ClusteredPool:
            queries, keys, values = (
                lax.dynamic_index_in_dim(tails, rows.slots[row], 2, keepdims=False)
                for tails in (pool.tail_queries, pool.tail_keys, pool.tail_values)
            )  # L Hq C D

            def find(_) -> Int32[Array, "L Hq"]:
                def of_layer(of_one):
                    q, k, count, layer = of_one
                    q, k = jnp.swapaxes(q, 0, 1), jnp.swapaxes(k, 0, 1)[:, ::group]
                    return self._clustered(q, k, count, layer)

                return lax.map(of_layer, (queries, keys, counts, layers))

            def as_before(_) -> Int32[Array, "L Hq"]:
                first = jnp.asarray(tables)[row, 0]
                return pool.representatives.at[:, first].get(mode="clip").astype(jnp.int32)

            is_first = rows.lengths[row] < self.chunk_size
            maps = lax.cond(is_first, find, as_before, None)
            kept = self.slots.kept(maps)  # L S
            keys = jnp.take_along_axis(keys, kept[..., None, None], axis=1)
            keys, values = self._stored(keys, values[:, ::group])

            def put_keys(array: Array, new: Array) -> Array:
                return array.at[places, chunk].set(new, mode="drop")

            def put_values(array: Array, new: Array) -> Array:
                return array.at[:, :, chunk].set(new, mode="drop")

            return replace(
                pool._with_maps(slice(None), chunk, maps),
                keys=jax.tree.map(put_keys, pool.keys, keys),
                values=jax.tree.map(put_values, pool.values, values),
            )

        return rows.for_each_filled(self.num_chunks, self.chunk_size, seal_row, self)

    @property
    def chunks(self) -> ChunkArrays:
        """What is kept of full chunks, and their maps."""
        return ChunkArrays(self.values, (self.keys, self.representatives, self.head_slots))

    def with_chunks(self, chunks: ChunkArrays) -> ClusteredPool:
        """With these arrays of chunks."""
        keys, representatives, head_slots = chunks.others
        return replace(
            self,
            keys=keys,
            values=chunks.of_heads,
            representatives=representatives,
            head_slots=head_slots,
        )

    def copy_tails(
        self, sources: Int32[HostOrDevice, " M"], destinations: Int32[HostOrDevice, " M"]
    ) -> ClusteredPool:
        """With slots' tails copied; all are read before any is written. Slot S drops one."""
        tails = self.tail_queries, self.tail_keys, self.tail_values
        queries, keys, values = copied(tails, sources, destinations)
        return replace(self, tail_queries=queries, tail_keys=keys, tail_values=values)

    def _stored(
        self, keys: Float[Array, "*chunks C D"], values: Float[Array, "*others C D"]
    ) -> tuple[Any, Any]:
        """As full chunks are stored."""
        if self.codec is None:
            return keys, values
        return self.codec.keys.encode(keys), self.codec.values.encode(values)

    def _clustered(
        self,
        q: Float[Array, "C Hq D"],
        k: Float[Array, "C Hkv D"],
        count: Int32[Array, ""],
        layer: Int32[Array, ""],
    ) -> Int32[Array, " Hq"]:
        """The representatives in sequences that begin with a chunk, by its attention."""
        how = self.clusters.membership, self.clusters.seed
        window = self.spec.layer_window(layer)
        return representatives_of(q, k, count, self.spec.attention, *how, window=window)

    def _with_maps(
        self,
        layer: Int32[Array, ""] | slice,
        chunks: Int32[Array, "*chunks"],
        representatives: Int32[Array, "*maps Hq"],
    ) -> ClusteredPool:
        """With the maps of chunks of a layer, or of several; chunk N drops one."""
        slots = self.slots.of_heads(representatives)

        def put(array: Array, new: Array) -> Array:
            return array.at[layer, chunks].set(new.astype(jnp.uint8), mode="drop")

        return replace(
            self,
            representatives=put(self.representatives, representatives),
            head_slots=put(self.head_slots, slots),
        )

    def _write_tails(
        self,
        layer: Int32[Array, ""],
        k: Float[Array, "T Hq D"],
        v: Float[Array, "T Hq D"],
        slots: Int32[HostOrDevice, " T"],
        offsets: Int32[HostOrDevice, " T"],
    ) -> ClusteredPool:
        tails = self.tail_keys, self.tail_values
        keys, values = written(tails, (k, v), layer, slots, offsets)
        return replace(self, tail_keys=keys, tail_values=values)
