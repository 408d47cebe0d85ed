"""How large the pool is, and what its chunks are stored as."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp

from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.tree.window_room import WindowRoom
from pallas_kernels.clusters import HeadClusters, KeySlots
from pallas_kernels.codecs import IDENTITY, ChunkCodec, codec_of, part_bytes
from pallas_kernels.selection import ChunkSelector, Landmarks

UNUSED_PART = 4
"""Of the chunks, one in so many is kept for heads with windows beside those in use."""


@dataclass(frozen=True)
class CacheConfig:
    """Size and type of the pool.

    Attributes:
      num_chunks: chunks in the pool, N; None takes as many as fit into `memory`.
      chunk_size: tokens a chunk holds, C.
      dtype: of keys and values. In float32 tokens are those of a model without a cache; in float16
        or bfloat16 the pool holds twice as many, and reading them takes less of a CPU's time. XLA
        of jaxlib 0.10.2 converts a bfloat16 pool as a whole where it reads or writes it on a CPU,
        which it does only where there is no compiled kernel.
      memory: of the pool, in bytes or as text with a unit: "2GiB", "500 MB". Instead of
        `num_chunks`, not beside it. On a mesh that of all devices together, each head counted once.
      codec: what full chunks are encoded by: a name such as "int4" (see `pallas_kernels.codecs`),
        "identity" for none, or a codec itself, such as `models.calibration.load_codec` reads. Then
        `dtype` is of the rows' last chunks, which are exact: one for each row that an engine may
        run.
      selector: what queries read of the chunks before theirs; None where they read all.
      window_chunks: chunks of heads with windows, M, where a model has some. They may be fewer than
        `num_chunks`, since what all windows have left can be given up; then `num_chunks` are of the
        heads that see all. None takes what the rows of an engine can come to need, and a quarter of
        `num_chunks` for prefixes that nobody uses, or all if that is no less. With a codec or a
        selector nothing is given up, and this must be None.
      clusters: how many clusters the query heads of each layer form, of which the pool keeps keys
        once; None where each head has its own.
      host_memory: of the host, as `memory`, for full chunks that the pool gives up: a prompt that
        begins with them has them brought back. None keeps none.
      disk: a folder where full chunks are kept in files, which engines of other processes find too,
        if they serve the same weights with such a cache. None keeps none.
      disk_memory: what all files in that folder may take, as `memory`; those used longest ago make
        room.
      load: "faster" computes chunks again where, as measured, that takes less time than to bring
        them back; "always" does not ask.

    With either tier, heads with windows have as many chunks as the others.

    Raises:
      ValueError: for sizes below 1, a memory that cannot be read, a dtype that is not a float, or a
        codec that is not known.
    """

    num_chunks: int | None = None
    chunk_size: int = 64
    dtype: str = "float32"
    memory: int | str | None = None
    codec: str | ChunkCodec = IDENTITY
    selector: ChunkSelector | None = None
    window_chunks: int | None = None
    clusters: HeadClusters | None = None
    host_memory: int | str | None = None
    disk: str | Path | None = None
    disk_memory: int | str | None = None
    load: str = "faster"

    def __post_init__(self):
        if (self.num_chunks is None) == (self.memory is None):
            raise ValueError("a pool needs num_chunks or memory, and not both")
        for size in (self.memory, self.host_memory, self.disk_memory):
            if size is not None:
                parse_bytes(size)
        if (self.disk is None) != (self.disk_memory is None):
            raise ValueError("a disk needs disk and disk_memory: a folder, and what it may take")
        if self.load not in ("faster", "always"):
            raise ValueError(f"load must be 'faster' or 'always', got {self.load!r}")
        for name in ("num_chunks", "chunk_size", "window_chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float16 for a KV pool, got {self.dtype!r}"
            )
        _ = self.chunk_codec
        if self.window_chunks is not None and (self.whole_chunks or self.has_tiers):
            raise ValueError(
                "window_chunks is not for pools with a codec, a selector, clusters, or tiers"
            )
        if self.clusters is not None:
            if self.selector is not None:
                raise ValueError("a pool of clustered heads takes no selector yet")
            codec = self.chunk_codec
            if codec is not None and codec.constants.heads is not None:
                raise ValueError(
                    f"codec {codec.name!r} was calibrated for each KV head, and clusters have keys "
                    "of one head or another"
                )

    @property
    def chunk_codec(self) -> ChunkCodec | None:
        """What full chunks are encoded by, if they are."""
        return codec_of(self.codec) if isinstance(self.codec, str) else self.codec

    @property
    def codec_name(self) -> str:
        """Of the codec, "identity" where chunks are stored as they are."""
        codec = self.chunk_codec
        return codec.name if codec is not None else IDENTITY

    @property
    def has_tiers(self) -> bool:
        """Whether chunks are kept behind the pool."""
        return self.host_memory is not None or self.disk is not None

    def without_tiers(self) -> CacheConfig:
        """What concerns the pool alone."""
        nothing = dict.fromkeys(("host_memory", "disk", "disk_memory"))
        return replace(self, **nothing, load="faster")

    @property
    def whole_chunks(self) -> bool:
        """Whether something is made of full chunks, so that prefill calls have each as a whole."""
        return any(each is not None for each in (self.chunk_codec, self.selector, self.clusters))

    @property
    def copies_tails(self) -> bool:
        """Whether rows have exact tails, so that a fork can go on from its parent's. Not where rows
        choose: what the parent had chosen where the fork begins may be gone."""
        return self.has_tails and self.selector is None

    @property
    def takes_given_chunks(self) -> bool:
        """Whether keys and values that no token has can be stored, where heads with windows have no
        chunks of their own. Not with clusters: which heads attend for others is found by queries.
        """
        return self.clusters is None

    @property
    def has_tails(self) -> bool:
        """Whether each row's last chunk is kept apart, exact."""
        return self.chunk_codec is not None or self.clusters is not None

    @property
    def tables_beyond(self) -> int | None:
        """How many chunks the longest row may have in a decode plan that has not the chunks of each
        row as a whole: of more than these rows choose, and clusters look at the first of them. None
        where no plan needs them."""
        if self.clusters is not None:
            return 0
        return None if self.selector is None else self.selector.whole

    def for_model(self, spec: CacheSpec) -> CacheConfig:
        """Without clusters where each holds one head.

        Raises:
          ValueError: for clusters that are not for the model's layers and heads.
        """
        if self.clusters is None:
            return self
        self._check_clusters(self.clusters, spec)
        return self if self.clusters.merges(spec.attention.heads) else replace(self, clusters=None)

    @property
    def landmarks(self) -> Landmarks:
        """What is kept of full chunks beside keys and values, for a selector.

        Raises:
          ValueError: when there is none.
        """
        if self.selector is None:
            raise ValueError("queries choose nothing here")
        return Landmarks.of(self.selector, encoded=self.chunk_codec is not None)

    def check(self, spec: CacheSpec) -> None:
        """Raises CodecError when the codec cannot store a model's chunks, and ValueError when the
        selector cannot choose among them."""
        codec = self.chunk_codec
        if codec is not None:
            heads = spec.num_layers, spec.num_kv_heads
            codec.check(self.chunk_size, spec.head_dim, heads)
        if self.clusters is not None:
            self._check_clusters(self.clusters, spec)
        if self.selector is not None:
            self.selector.check(self.chunk_size, spec.num_layers)
            problem = self.landmarks.problem(self.chunk_size, spec.head_dim)
            if problem is not None:
                raise ValueError(f"selector {self.selector.name!r} keeps codes of keys: {problem}")
            if spec.windows is not None and None not in spec.different_windows:
                raise ValueError("all heads have windows, so there is nothing to select among")

    def _check_clusters(self, clusters: HeadClusters, spec: CacheSpec) -> None:
        clusters.check(spec.num_layers, spec.attention.heads)
        if any(len(set(layer)) > 1 for layer in spec.windows_of_heads):
            raise ValueError("heads of a layer form clusters only where all have the same window")

    def chunks_for(self, spec: CacheSpec, num_slots: int = 0) -> int:
        """Chunks in the pool of a model, N: those asked for, or those that fit into `memory`,
        beside the exact last chunks of `num_slots` rows where those are kept apart.

        Raises:
          ValueError: when not even one fits, or the codec cannot store the model's.
        """
        bytes_per_chunk = self.bytes_per_chunk(spec)
        if self.num_chunks is not None:
            return self.num_chunks
        assert self.memory is not None, "checked when made"
        tails = num_slots * self.tail_bytes(spec)
        num_chunks = (parse_bytes(self.memory) - tails) // bytes_per_chunk
        if num_chunks < 1:
            beside = f" beside {tails:,} for the last chunks of {num_slots} rows" if tails else ""
            raise ValueError(
                f"a chunk takes {bytes_per_chunk:,} bytes{beside}, memory is {self.memory}"
            )
        return num_chunks

    def with_window_room(
        self, spec: CacheSpec, rows: int, *, num_slots: int, ahead: int, call: int
    ) -> tuple[CacheConfig, WindowRoom | None]:
        """With `num_chunks`, and what heads with windows have where that is less.

        Args:
          rows: at once.
          num_slots: of the request table, at least as many.
          ahead, call: tokens that have room before they are computed, at most: of a row, and of a
            prefill call.

        Raises:
          ValueError: when not even one chunk fits, or too few for windows, or `window_chunks` is
            given for a model without windows.
        """
        window = spec.largest_window
        if window is None or self.whole_chunks or self.has_tiers:
            if self.window_chunks is not None:
                raise ValueError("window_chunks is for models with windows, and this has none")
            return replace(self, num_chunks=self.chunks_for(spec, num_slots), memory=None), None
        needed = WindowRoom(1, window, ahead, call).needed(rows, self.chunk_size)
        num_chunks = self._most_chunks(spec, needed)
        chunks = self._windowed(num_chunks, needed)
        config = replace(self, num_chunks=num_chunks, memory=None)
        if chunks >= num_chunks:
            return config, None
        return config, WindowRoom(chunks, window, ahead, call)

    def _windowed(self, num_chunks: int, needed: int) -> int:
        """Chunks of heads with windows, beside so many of others."""
        if self.window_chunks is not None:
            return self.window_chunks
        return needed + num_chunks // UNUSED_PART

    def _most_chunks(self, spec: CacheSpec, needed: int) -> int:
        """Chunks of heads that see all: as asked for, or as many as fit."""
        if self.num_chunks is not None:
            return self.num_chunks
        assert self.memory is not None, "checked when made"
        memory, exact = parse_bytes(self.memory), self.exact_bytes(spec)
        windowed = self.windowed_bytes(spec)
        few, many = self.chunks_for(spec), memory  # the first fit, whatever there is to give up
        while many - few > 1:
            tried = (few + many) // 2
            chunks = min(tried, self._windowed(tried, needed))
            fits = tried * (exact - windowed) + chunks * windowed <= memory
            few, many = (tried, many) if fits else (few, tried)
        return few

    def windowed_bytes(self, spec: CacheSpec) -> int:
        """Bytes of a chunk that is stored as it is that are of heads with windows."""
        heads = [window for layer in spec.windows_of_heads for window in layer]
        return self.exact_bytes(spec) * sum(map(bool, heads)) // len(heads)

    def bytes_per_chunk(self, spec: CacheSpec) -> int:
        """Bytes that one full chunk's keys and values take over all layers, and its landmarks.

        Raises:
          CodecError: when the codec cannot store the model's.
          ValueError: when the selector cannot choose among them.
        """
        self.check(spec)
        codec, heads = self.chunk_codec, spec.num_layers * spec.num_kv_heads
        kept = 0
        if self.selector is not None:
            kept = heads * self.landmarks.bytes(self.chunk_size, spec.head_dim)
        if self.clusters is not None:
            return self._clustered_bytes(self.clusters, spec)
        if codec is None:
            return self.exact_bytes(spec) + kept
        return codec.head_bytes(self.chunk_size, spec.head_dim) * heads + kept

    def _clustered_bytes(self, clusters: HeadClusters, spec: CacheSpec) -> int:
        """Of a chunk: keys of clusters, values of all heads, and two maps of 8 bits a head."""
        heads = spec.attention.heads
        keys, values = KeySlots.of(clusters, heads).total, spec.num_layers * heads.kv_heads
        maps = 2 * spec.num_layers * heads.query_heads
        codec, sizes = self.chunk_codec, (self.chunk_size, spec.head_dim)
        if codec is None:
            numbers = (keys + values) * self.chunk_size * spec.head_dim
            return numbers * jnp.dtype(self.dtype).itemsize + maps
        coded = part_bytes(codec.keys, *sizes), part_bytes(codec.values, *sizes)
        return keys * coded[0] + values * coded[1] + maps

    def tail_bytes(self, spec: CacheSpec) -> int:
        """Bytes of a row's last chunk where it is kept apart; with clusters, queries, keys and
        values of every query head."""
        if not self.has_tails:
            return 0
        if self.clusters is None:
            return self.exact_bytes(spec)
        return 3 * spec.attention.heads.group * self.exact_bytes(spec) // 2

    def exact_bytes(self, spec: CacheSpec) -> int:
        """Bytes that a chunk takes as it is."""
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
