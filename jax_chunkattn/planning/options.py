"""How the planner may cut work, and for which device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

WorthSharing = Callable[[np.ndarray, np.ndarray], np.ndarray]
PACKINGS = ("cost", "fasttree", "pat")


@dataclass(frozen=True)
class GpuCosts:
    """What work takes on a GPU: estimates from the H200's data sheet, not measured yet.

    Attributes:
      bytes_per_second: of memory, all processors together: 4.8 TB/s.
      programs_per_sm: programs of the chunk-first phase that a processor runs at once; each gets
        its part of the memory's bandwidth.
      program_seconds: what a program takes besides reading chunks: being started, loading its
        queries, filling and draining its pipeline. About 1.5 reads of a chunk of 64 tokens with
        D = 128 in bf16.
      partial_writes, partial_reads: how often the float32 output of a partial, G x D, crosses the
        memory bus when it is left behind, and when it is merged: the second is more because the
        reads are short and depend on an index.
    """

    bytes_per_second: float = 4.8e12
    programs_per_sm: int = 2
    program_seconds: float = 2.7e-6
    partial_writes: float = 1.0
    partial_reads: float = 2.0


@dataclass(frozen=True)
class GpuWork:
    """The attention that is planned for, the device, and how work is cut for it.

    Attributes:
      num_sms: processors of the device.
      num_heads, num_kv_heads, head_dim, chunk_size, dtype_bytes: of the pool and its queries.
      packing: which rectangles of rows and chunks become items: one of `PACKINGS`, see
        `jax_chunkattn.planning.packing`.
      align: flattened query rows (rows x G) that a kernel writes at once; each item has slots for
        whole multiples. 1 packs them without gaps.
      query_tile: most flattened query rows of an item; at least one row goes in whatever G is.
      min_piece_tokens: runs are not cut into pieces shorter than this.
      max_private_chunks: full chunks that a row may keep in the sequence-first phase, besides its
        tail. A row with more gets them all as an item of its own.
    """

    num_sms: int = 132
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 128
    chunk_size: int = 64
    dtype_bytes: int = 2
    packing: str = "cost"
    align: int = 64
    query_tile: int = 64
    min_piece_tokens: int = 256
    max_private_chunks: int = 2
    costs: GpuCosts = field(default=GpuCosts())

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise ValueError(f"unknown packing {self.packing!r}; known: {', '.join(PACKINGS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads"
            )
        for name in ("num_sms", "head_dim", "chunk_size", "dtype_bytes", "align", "query_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def group(self) -> int:
        """Query heads that read one KV head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_rows(self) -> int:
        """Most rows of an item."""
        return max(1, self.query_tile // self.group)

    @property
    def min_piece(self) -> int:
        """Fewest chunks of a piece that is cut from a longer run."""
        return max(1, self.min_piece_tokens // self.chunk_size)

    @property
    def workers(self) -> int:
        """Programs that run at once."""
        return self.num_sms * self.costs.programs_per_sm

    @property
    def chunk_seconds(self) -> float:
        """A program's reading of one chunk, keys and values of one KV head: the unit of costs."""
        chunk_bytes = 2 * self.chunk_size * self.head_dim * self.dtype_bytes
        return chunk_bytes * self.workers / self.costs.bytes_per_second

    @property
    def program_cost(self) -> float:
        """A program's overhead, in chunks."""
        return self.costs.program_seconds / self.chunk_seconds

    @property
    def partial_write_cost(self) -> float:
        """Leaving a row's partial behind, in chunks."""
        return self.costs.partial_writes * self._partial_chunks

    @property
    def partial_read_cost(self) -> float:
        """Merging a row's partial, in chunks."""
        return self.costs.partial_reads * self._partial_chunks

    @property
    def _partial_chunks(self) -> float:
        return 4 * self.group / (2 * self.chunk_size * self.dtype_bytes)


@dataclass(frozen=True)
class PlannerOptions:
    """How work is cut.

    Attributes:
      sharing: False plans every row by itself, which is paged attention.
      item_overhead, item_read: cost of a work item, and of each token it reads, where 1 is what a
        row's own read of a private token costs. A run of chunks becomes an item when that is
        cheaper than every row's reading it. The defaults are the XLA implementation's on 2 CPU
        cores: about 10 us an item and 8 to 10 us for 64 tokens against 3.4 (D = 128, float32).
      even_rows: whether rows' private chunks are read by a loop over all rows, which runs as long
        as the longest: then what a row has more than others may become an item of its own.
      in_order: what rows share comes before all that each reads by itself, as in their sequences:
        for attention that adds up in that order. Chunks are then shared by rows that share all
        before them, too; and where windows have left some of those, by none.
      worth_sharing: overrides that rule, and any GPU packing: (rows, chunks) of every candidate ->
        bool of each.
      max_item_chunks, max_item_rows: cut items longer or taller than this; None leaves them whole.
      gpu: plan for this device instead; costs and cuts are then its own.
    """

    sharing: bool = True
    item_overhead: float = 192.0
    item_read: float = 2.5
    even_rows: bool = True
    in_order: bool = False
    worth_sharing: WorthSharing | None = None
    max_item_chunks: int | None = None
    max_item_rows: int | None = None
    gpu: GpuWork | None = None

    @classmethod
    def for_native(cls, *, sharing: bool = True, in_order: bool = False) -> PlannerOptions:
        """Options for the implementation that is compiled for the processor at hand.

        It cuts work by itself, and two rows read a chunk in less than twice the time of one: what
        is in common, if only a chunk, is shared. With 2, 4, 8 and 16 rows below 64 tokens each, 32
        query heads and 8 KV heads of 128 numbers, that takes 3.6 ms; with a cost of 8 tokens for an
        item 4.3, and of 32 tokens and 1.2 for each read 4.9.
        """
        costs = {"item_overhead": 0, "item_read": 1, "even_rows": False}
        return cls(sharing=sharing, in_order=in_order, **costs)

    @classmethod
    def for_gpu(
        cls, *, sharing: bool = True, worth_sharing: WorthSharing | None = None, **work
    ) -> PlannerOptions:
        """Options for a GPU; `work` are the fields of `GpuWork`."""
        return cls(sharing=sharing, worth_sharing=worth_sharing, gpu=GpuWork(**work))
