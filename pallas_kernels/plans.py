"""What the kernels read: block tables flattened into int32 arrays of static shape.

A plan is made on the host (`jax_chunkattn.planning`) and passed to jitted functions as a pytree.
Every array is padded to a bucketed size, so that only the sizes decide which compiled program runs.
Padding names the chunk `num_chunks` ("nowhere"): never -1, which wraps.

Where heads have windows, a plan is several in one: each array has a first axis *W over the windows,
and each head goes by those of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

HostOrDevice = Array | np.ndarray
"""The host makes NumPy arrays; inside a jitted function they are JAX's."""

Plan = TypeVar("Plan", "DecodePlan", "PrefillPlan")
Reads = TypeVar("Reads", "DecodeReads", "PrefillReads")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChosenChunks:
    """Which chunks of its items each row reads, where rows have chosen some of them.

    Letters: K chunk ids of all items, B rows, P chunks of a sequence.
    """

    columns: Int32[Array, "*W K"]  # of an item's chunk, its place in the rows' sequences
    by_row: Bool[Array, "*W B P"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChosenTiles:
    """Chunks that rows have chosen, each with a few of those who have. A chunk that more rows have
    chosen has more tiles.

    Letters: T tiles of M rows.
    """

    chunks: Int32[HostOrDevice, "*W T"]
    rows: Int32[HostOrDevice, "*W T M"]  # B where fewer have chosen the chunk
    count: Int32[HostOrDevice, "*W"]  # tiles; the rest of `chunks` and `rows` is padding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkItems:
    """Runs of full chunks, each with the contiguous range of rows that attends to all of it.

    The chunk-first phase reads a run once for all its rows (ChunkAttention, arXiv 2402.15220,
    section 3.2). A row is a sequence when decoding and a token when prefilling.

    Letters: I work items, K chunk ids of all items.
    """

    row_begin: Int32[HostOrDevice, "*W I"]
    row_count: Int32[HostOrDevice, "*W I"]
    chunk_begin: Int32[HostOrDevice, "*W I"]  # into `chunks`
    chunk_count: Int32[HostOrDevice, "*W I"]
    chunks: Int32[HostOrDevice, "*W K"]
    count: Int32[HostOrDevice, "*W"]  # items; the rest of the arrays is padding
    chosen: ChosenChunks | None = None  # only where rows read a part of an item


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialSlots:
    """Where the work items leave their partial results, and where each row finds its own.

    On a GPU the two phases are two launches, and partials pass from one to the other through
    memory: one slot for each row of each item, those of an item one after another.

    Letters: I work items, E = B + 1 for B rows, S slots.
    """

    item_slot: Int32[HostOrDevice, "*W I"]  # slot of the item's first row
    row_begin: Int32[HostOrDevice, "*W E"]  # into `slots`; a row's end is the next row's begin
    slots: Int32[HostOrDevice, "*W S"]  # of every row in turn; as long as there are slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenTokens:
    """Which tokens a window hides in the chunks that a row, or a sequence, reads by itself.

    Counted in those chunks, one after another: from `begin` on, up to where the window begins, at
    the query's position plus 1, minus `size`, minus `offset`. Items have chunks alone that all
    their rows see as a whole.

    Letters: R rows or sequences.
    """

    size: Int32[HostOrDevice, "*W"]
    sinks: Int32[HostOrDevice, "*W"]
    begin: Int32[HostOrDevice, "*W R"]
    offset: Int32[HostOrDevice, "*W R"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodePlan:
    """Which chunks each row of a decode batch attends to, with shared runs named once.

    What no item covers is in `private_chunks`, in the order of the sequence: the tail comes last.
    Chunks that a row's window has left are in neither.

    Letters: B rows, P private chunks per row.
    """

    BY_WINDOW: ClassVar = (
        "items",
        "private_chunks",
        "covered_tokens",
        "partials",
        "hidden",
        "tiles",
    )

    items: WorkItems
    private_chunks: Int32[HostOrDevice, "*W B P"]
    covered_tokens: Int32[HostOrDevice, "*W B"]  # of the row, in whole chunks that are elsewhere
    partials: PartialSlots | None = None  # only for implementations that need them
    hidden: HiddenTokens | None = None  # only with windows
    tables: Int32[HostOrDevice, "B columns"] | None = None  # of whole sequences, where rows choose
    tiles: ChosenTiles | None = None  # where rows have chosen, instead of items, without `partials`

    @property
    def num_rows(self) -> int:
        """Rows that it is padded to."""
        return self.private_chunks.shape[-2]

    def of_windows(self, windows: Int32[HostOrDevice, "*windows"] | int) -> DecodePlan:
        """The plan of a window, or those of several."""
        return _of_windows(self, windows)

    def with_chunks(self, name: Callable[[HostOrDevice], HostOrDevice]) -> DecodePlan:
        """With other names for the chunks that are read."""
        items, tiles = replace(self.items, chunks=name(self.items.chunks)), self.tiles
        if tiles is not None:
            tiles = replace(tiles, chunks=name(tiles.chunks))
        return replace(self, items=items, private_chunks=name(self.private_chunks), tiles=tiles)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sealing:
    """Which chunks a prefill call completes, and where it leaves the tokens of those it does not.

    Letters: M chunks, T packed tokens.
    """

    begin: Int32[HostOrDevice, " M"]  # the first of a chunk's packed tokens; the others follow it
    positions: Int32[HostOrDevice, " M"]  # of that token in its sequence
    chunks: Int32[HostOrDevice, " M"]  # N for padding
    tail_slots: Int32[HostOrDevice, " T"]  # one past the last slot where a token is not kept

    def chunks_of(
        self, tokens: Float[Array, "T Hkv D"], chunk_size: int
    ) -> Float[Array, "M C Hkv D"]:
        """What the completed chunks have of packed tokens; for padding some of them."""
        packed = self.begin[:, None] + jnp.arange(chunk_size, dtype=jnp.int32)[None]
        return tokens.at[packed].get(mode="clip")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlan:
    """Where a packed run of new tokens is written, and which earlier tokens each may see.

    Tokens of several sequences lie one after another in one array of length T. The items cover
    the chunks wholly before a sequence's first new token; the rest, from `own_chunk` on, each token
    sees up to itself. A query tile is up to `query_tile` consecutive tokens of one sequence.

    With windows, there may be chunks before the first new token that no item covers: they stand in
    the table right before those of the new tokens, and `own_chunk` is the first of them. Only where
    heads with windows have chunks of their own, tokens are written to others for each window, *V.

    Letters: T packed tokens, Q query tiles, S sequences, P chunks per sequence.
    """

    BY_WINDOW: ClassVar = ("items", "block_tables", "own_chunk", "partials", "hidden")

    write_chunks: Int32[HostOrDevice, "*V T"]  # N where a token is padding or already in the pool
    write_offsets: Int32[HostOrDevice, " T"]
    items: WorkItems
    tile_begin: Int32[HostOrDevice, " Q"]  # first packed token of the tile
    tile_count: Int32[HostOrDevice, " Q"]
    tile_position: Int32[HostOrDevice, " Q"]  # position of that token in its sequence
    tile_sequence: Int32[HostOrDevice, " Q"]
    num_tiles: Int32[HostOrDevice, ""]
    block_tables: Int32[HostOrDevice, "*W S P"]
    own_chunk: Int32[HostOrDevice, "*W S"]  # first, by index in the table, that no item covers
    partials: PartialSlots | None = None  # only for implementations that need them
    sealing: Sealing | None = None  # only where something is made of full chunks
    hidden: HiddenTokens | None = None  # only with windows

    def of_windows(self, windows: Int32[HostOrDevice, "*windows"] | int) -> PrefillPlan:
        """The plan of a window, or those of several."""
        return _of_windows(self, windows)

    def with_chunks(self, name: Callable[[HostOrDevice], HostOrDevice]) -> PrefillPlan:
        """With other names for the chunks that are read."""
        items = replace(self.items, chunks=name(self.items.chunks))
        return replace(self, items=items, block_tables=name(self.block_tables))

    def token_positions(self, tokens: int) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
        """Sequence and position of every packed token; position -1 for padding."""
        token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
        tile_begin, tile_count = jnp.asarray(self.tile_begin), jnp.asarray(self.tile_count)
        used = (jnp.arange(len(tile_begin), dtype=jnp.int32) < self.num_tiles)[None]
        inside = (token >= tile_begin[None]) & (token < (tile_begin + tile_count)[None]) & used
        tile = jnp.argmax(inside, axis=1)
        position = jnp.asarray(self.tile_position)[tile] + token[:, 0] - tile_begin[tile]
        sequence = jnp.asarray(self.tile_sequence)[tile]
        return sequence, jnp.where(inside.any(axis=1), position, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnChunks:
    """The chunk that each row's last token lies in, exact, where the pool's are encoded.

    Letters: B rows, L layers, Hkv KV heads, S slots of C tokens, D numbers of a head.
    """

    keys: Float[Array, "L Hkv S C D"]
    values: Float[Array, "L Hkv S C D"]
    slots: Int32[HostOrDevice, " B"]  # S and more where a row has no tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """Exact keys and values of all tokens of a prefill call, where the pool's are encoded."""

    keys: Float[Array, "T Hkv D"]
    values: Float[Array, "T Hkv D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeReads:
    """Which tokens each row of a decode batch reads: the first `lengths` of its chunks in the plan.

    With `own`, those of the chunk that the last of them lies in are read there, and not in the
    pool: so what a row reads of a chunk depends on its position alone, never on when the chunk was
    encoded.

    With `head_windows`, each KV head reads by the plan of that window. The queries are at positions
    `lengths - 1`, for which the plan must be good.

    Letters: B rows, Hkv KV heads.
    """

    plan: DecodePlan
    lengths: Int32[HostOrDevice, " B"]
    own: OwnChunks | None = None
    head_windows: Int32[HostOrDevice, " Hkv"] | None = None

    def by_head(self, head: Int32[Array, ""]) -> DecodeReads:
        """What a KV head reads: by the plan of its window."""
        return _by_head(self, head)

    def sees(self, place: Int32[Array, " T"], end: Int32[HostOrDevice, " B"]) -> Bool[Array, "B T"]:
        """Whether each row of one head sees the tokens at these places in its private chunks, of
        which those up to `end` are there."""
        seen = place[None] < jnp.asarray(end)[:, None]
        hidden = self.plan.hidden
        if hidden is None:
            return seen
        begin = jnp.asarray(hidden.begin)[:, None]
        opens = jnp.asarray(self.lengths - hidden.size - hidden.offset)[:, None]
        return seen & ((place[None] < begin) | (place[None] >= opens))

    def sees_own(self, chunk_size: int) -> Bool[Array, "B C"]:
        """Whether each row of one head sees the tokens of its own chunk."""
        begin, end = jnp.asarray(self.pool_lengths(chunk_size)), jnp.asarray(self.lengths)
        position = begin[:, None] + jnp.arange(chunk_size, dtype=jnp.int32)[None]
        seen = position < end[:, None]
        hidden = self.plan.hidden
        if hidden is None:
            return seen
        opens = (end - hidden.size)[:, None]
        return seen & ((position < hidden.sinks) | (position >= opens))

    def pool_lengths(self, chunk_size: int) -> Int32[HostOrDevice, " B"]:
        """How many of its tokens each row reads in the pool."""
        if self.own is None:
            return self.lengths
        return jnp.maximum(self.lengths - 1, 0) // chunk_size * chunk_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillReads:
    """Which tokens each packed token reads: those of its sequence in the plan, up to itself.

    With `new`, those of the chunk that it lies in are read there, and not in the pool; then each
    segment begins with the first token of a chunk. `head_windows` is as in `DecodeReads`.
    """

    plan: PrefillPlan
    query_tile: int = field(metadata={"static": True})  # most tokens a tile of the plan has
    new: NewTokens | None = None
    head_windows: Int32[HostOrDevice, " Hkv"] | None = None

    def by_head(self, head: Int32[Array, ""]) -> PrefillReads:
        """What a KV head reads: by the plan of its window."""
        return _by_head(self, head)


def _by_head(reads: Reads, head: Int32[Array, ""]) -> Reads:
    if reads.head_windows is None:
        return reads
    plan = reads.plan.of_windows(jnp.asarray(reads.head_windows)[head])
    return replace(reads, plan=plan, head_windows=None)


def _of_windows(plan: Plan, windows: Int32[HostOrDevice, "*windows"] | int) -> Plan:
    chosen = {
        name: jax.tree.map(lambda array: jnp.asarray(array)[windows], getattr(plan, name))
        for name in plan.BY_WINDOW
    }
    return replace(plan, **chosen)


def window_index(head_windows: Any, head: Any) -> tuple:
    """In a kernel, what the arrays of a plan are indexed by before all else: the window of a KV
    head, or nothing."""
    return () if head_windows is None else (head_windows[head],)


def windows_of_heads(
    plan: DecodePlan | PrefillPlan, windows: Int32[HostOrDevice, " Hkv"] | None, kv_heads: int
) -> Int32[HostOrDevice, " Hkv"] | None:
    """`windows`, or where None and the plan has some, the first for each head.

    Raises:
      ValueError: for windows of heads that the plan has none for.
    """
    if plan.hidden is None:
        if windows is not None:
            raise ValueError("the plan was made without windows, so heads can have none")
        return None
    return jnp.zeros(kv_heads, jnp.int32) if windows is None else windows


def check_windows(reads: DecodeReads | PrefillReads) -> None:
    """Raises ValueError when heads have windows and the plan has none, or the other way round."""
    if (reads.plan.hidden is None) != (reads.head_windows is None):
        has, lacks = ("heads have", "plan") if reads.plan.hidden is None else ("plan has", "heads")
        raise ValueError(f"the {has} windows, and the {lacks} none: make the plan with the model's")


def check_sizes(rows: int, kv_heads: int, reads: DecodeReads | PrefillReads) -> None:
    """Raises ValueError for a plan of other rows, or windows of other heads."""
    if isinstance(reads, DecodeReads):
        lengths = np.shape(reads.lengths)[0]
        if not rows == lengths == reads.plan.num_rows:
            raise ValueError(
                f"there are {rows} queries and {lengths} lengths, and the plan is of "
                f"{reads.plan.num_rows} rows, padding among them"
            )
    elif reads.new is not None and reads.new.keys.shape[0] != rows:
        raise ValueError(f"there are {rows} queries and {reads.new.keys.shape[0]} new tokens")
    if reads.head_windows is not None and np.shape(reads.head_windows) != (kv_heads,):
        raise ValueError(
            f"windows are of {np.shape(reads.head_windows)[0]} heads, and there are {kv_heads}"
        )


def require_partials(plan: DecodePlan | PrefillPlan) -> PartialSlots:
    """The plan's slots for partials.

    Raises:
      ValueError: when it has none.
    """
    if plan.partials is None:
        raise ValueError("the plan has no slots for partials: plan with PlannerOptions.for_gpu")
    return plan.partials


def require_own(reads: DecodeReads) -> OwnChunks:
    """The rows' own chunks.

    Raises:
      ValueError: when there are none.
    """
    if reads.own is None:
        raise ValueError("encoded chunks are read here only with what each row has of its own")
    return reads.own
