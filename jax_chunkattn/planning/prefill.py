"""Prefill, on the host: tokens of new sequences that are not cached yet, packed into few calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Int32

from jax_chunkattn.planning.block_table import (
    Blocks,
    bucket,
    common_runs,
    covered_mask,
    in_order,
    pad_tables,
)
from jax_chunkattn.planning.gpu_division import cut_for_gpu
from jax_chunkattn.planning.gpu_time import choose_pieces, most_items_alone
from jax_chunkattn.planning.options import GpuWork, PlannerOptions
from jax_chunkattn.planning.packing import single_rows
from jax_chunkattn.planning.reach import Reach, hidden_tokens, stack, with_window_ids
from jax_chunkattn.planning.scored_tokens import UNSCORED, ScoredTokens
from jax_chunkattn.planning.work_items import flatten_items, items_of, pad, partial_slots
from pallas_kernels import PrefillPlan
from pallas_kernels.plans import HiddenTokens, HostOrDevice, PartialSlots, Sealing, WorkItems
from pallas_kernels.windows import Window

Owner = TypeVar("Owner")
Span = tuple[int, int]  # of positions in one sequence: the first, and the one behind the last

CALL_TOKENS = (32, 128, 512)  # of a call, which is padded to one of these; see `prefill_round`
QUERY_TILE = 64  # tokens of one sequence that share a pass over their context
TOKENS_PER_SEQUENCE = 16  # a call of T tokens takes at most T / 16 sequences
MIN_TABLE_WIDTH = 32
MIN_ITEM_CHUNKS = 256
ITEMS_PER_TOKEN = 4  # on a GPU: levels of sharing times pieces; more make a call's shape larger


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence to compute, at positions `[begin, end)`.

    `write_from` is the first position whose keys and values are not in the pool yet: a prompt that
    is cached as a whole still computes its last token, for the logits, and writes nothing.
    `tail_slot`, where full chunks are encoded, keeps what the segment leaves of one that is not
    full; None keeps it nowhere. `window_columns` are the chunks, by their place in the sequence,
    that heads with windows do not have yet, whatever the others have. `targets` are the tokens that
    follow its own and are to be scored, `UNSCORED` for those that are not, with `top` of the
    likeliest; none of them if it is empty.
    """

    tokens: Sequence[int]  # those of the positions [begin, end)
    chunk_ids: list[int]  # of the whole sequence
    begin: int
    end: int
    write_from: int
    tail_slot: int | None = None
    window_columns: Sequence[int] = ()
    targets: Sequence[int] = ()
    top: int = 0

    @property
    def num_scored(self) -> int:
        """Of its targets, those that are scored."""
        return sum(target != UNSCORED for target in self.targets)

    def until(self, end: int) -> Segment:
        """The part of it before a position."""
        length = end - self.begin
        tokens, targets = self.tokens[:length], self.targets[:length]
        return replace(self, tokens=tokens, end=end, targets=targets)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillBatch:
    """One call's tokens, packed one segment after another."""

    tokens: Int32[HostOrDevice, " T"]
    positions: Int32[HostOrDevice, " T"]
    last_token: Int32[HostOrDevice, " S"]  # where each segment's last token is packed
    plan: PrefillPlan
    scored: ScoredTokens | None = None


@dataclass(frozen=True)
class PrefillShape:
    """The padded sizes of a call that decide, beside its tokens, which compiled program runs it.

    `slots` is 0 in plans without partials. Calls of T tokens start from larger sizes than 0.
    """

    table_width: int = 0
    items: int = 0
    item_chunks: int = 0
    slots: int = 0

    @classmethod
    def of(cls, batch: PrefillBatch) -> PrefillShape:
        plan = batch.plan
        return cls(
            plan.block_tables.shape[-1],
            plan.items.row_begin.shape[-1],
            plan.items.chunks.shape[-1],
            plan.partials.slots.shape[-1] if plan.partials is not None else 0,
        )

    @classmethod
    def largest(cls, num_tokens: int, columns: int, options: PlannerOptions) -> PrefillShape:
        """A shape that holds every call of `num_tokens` for sequences of at most `columns` chunks.

        On a GPU, where every program of the grid costs something even if it has no work, not every
        call: all that share nothing, and those that share unless they have unusually many items.
        """
        least = cls._least(num_tokens, options.gpu)
        items = slots = 0
        segments = max_segments(num_tokens)
        if options.gpu is not None:
            tiles = -(-num_tokens // options.gpu.tile_rows) + segments
            items, slots = most_items_alone(tiles, segments, columns, options.gpu)
        return cls(
            table_width=bucket(columns, least.table_width),
            items=bucket(items, least.items),
            item_chunks=bucket(segments * columns, least.item_chunks),
            slots=bucket(slots, least.slots) if least.slots else 0,
        )

    @classmethod
    def _least(cls, num_tokens: int, gpu: GpuWork | None) -> PrefillShape:
        """What calls of T tokens are padded to at least, so that nearly all have one shape."""
        items = 2 * max_segments(num_tokens)  # a tree with S leaves has fewer than 2 S runs
        slots = 0
        if gpu is not None:
            items += ITEMS_PER_TOKEN * -(-num_tokens // gpu.tile_rows)
            slots = bucket(ITEMS_PER_TOKEN * num_tokens)
        return cls(MIN_TABLE_WIDTH, bucket(items), MIN_ITEM_CHUNKS, slots)

    def _and(self, other: PrefillShape) -> PrefillShape:
        return PrefillShape(*map(max, vars(self).values(), vars(other).values()))


def pack_segments(
    segments: Sequence[Segment],
    *,
    num_tokens: int,
    chunk_size: int,
    num_chunks: int,
    options: PlannerOptions = PlannerOptions(),
    at_least: PrefillShape = PrefillShape(),
    num_slots: int | None = None,
    windows: Sequence[Window | None] = (),
    window_ids: np.ndarray | None = None,
) -> PrefillBatch:
    """Packs segments into arrays of T = `num_tokens`; at most T / 16 of them, T tokens in all.

    Segments whose sequences begin with the same chunks read them once if they are neighbours and
    the options share. Options for a GPU cut the items and give the plan slots for partials; no
    other option counts. All calls of T tokens have one shape, that of `at_least` or a smaller one,
    unless their sequences have very long prefixes or, on a GPU, their tokens more than four items
    each: then some sizes double, and another program is compiled.

    With `num_slots`, of a pool that encodes full chunks, the plan says which chunks the call
    completes and where the rest goes; each segment then begins where a chunk does.

    With `windows`, of the heads that read by the plan, what says which chunks are read has a first
    axis over these. With `window_ids` (int32 [num_chunks + 1]) heads that have one name chunks
    so, and tokens are written for each of the windows.

    Raises:
      ValueError: when they do not fit, or begin within a chunk.
    """
    lengths = [segment.end - segment.begin for segment in segments]
    most = max_segments(num_tokens)
    if sum(lengths) > num_tokens or len(segments) > most:
        raise ValueError(
            f"{len(segments)} segments of {sum(lengths)} tokens do not fit a call of "
            f"{num_tokens} tokens and {most} segments"
        )
    least = PrefillShape._least(num_tokens, options.gpu)._and(at_least)
    width = bucket(max(len(segment.chunk_ids) for segment in segments), least.table_width)
    tokens = np.zeros(num_tokens, np.int32)
    positions = np.zeros(num_tokens, np.int32)
    chunks = np.full(num_tokens, num_chunks, np.int32)
    window_chunks = chunks.copy()
    last_token = np.zeros(most, np.int32)
    tiles = []
    start = 0
    for index, (segment, length) in enumerate(zip(segments, lengths, strict=True)):
        packed = slice(start, start + length)
        position = np.arange(segment.begin, segment.end, dtype=np.int32)
        own = np.asarray(segment.chunk_ids, np.int32)
        tokens[packed] = segment.tokens
        positions[packed] = position
        column = position // chunk_size
        written = position >= segment.write_from
        chunks[packed] = np.where(written, own[column], num_chunks)
        if window_ids is not None:
            written |= np.isin(column, segment.window_columns)
            window_chunks[packed] = np.where(written, window_ids[own[column]], num_chunks)
        last_token[index] = start + length - 1
        for first in range(0, length, QUERY_TILE):
            size = min(QUERY_TILE, length - first)
            tiles.append((start + first, size, segment.begin + first, index))
        start += length
    padded_tiles = np.zeros((4, -(-num_tokens // QUERY_TILE) + most), np.int32)
    padded_tiles[:, : len(tiles)] = np.array(tiles, np.int32).T
    tile_begin, tile_count, tile_position, tile_sequence = padded_tiles
    least = replace(least, table_width=width)
    reads, hidden = _reads(
        segments, num_tokens, chunk_size, num_chunks, options, least, windows, window_ids
    )
    if window_ids is not None:
        chunks = np.stack([chunks if window is None else window_chunks for window in windows])
    plan = PrefillPlan(
        chunks,
        positions % chunk_size,
        reads.items,
        tile_begin,
        tile_count,
        tile_position,
        tile_sequence,
        np.asarray(len(tiles), np.int32),
        block_tables=reads.block_tables,
        own_chunk=reads.own_chunk,
        partials=reads.partials,
        hidden=hidden,
        sealing=None
        if num_slots is None
        else _sealing(segments, num_tokens, chunk_size, num_chunks, num_slots),
    )
    following = [
        segment.targets or [UNSCORED] * length
        for segment, length in zip(segments, lengths, strict=True)
    ]
    scored = ScoredTokens.pack(following, [segment.top for segment in segments], num_tokens)
    return PrefillBatch(tokens, positions, last_token, plan, scored)


def _sealing(
    segments: Sequence[Segment], num_tokens: int, chunk_size: int, num_chunks: int, num_slots: int
) -> Sealing:
    """The chunks that are full behind a segment and were not before, and where the rest goes."""
    begins, positions, chunks = [], [], []
    tail_slots = np.full(num_tokens, num_slots, np.int32)
    start = 0
    for segment in segments:
        if segment.begin % chunk_size:
            raise ValueError(
                f"a segment begins at {segment.begin}, within a chunk of {chunk_size} tokens; "
                "where chunks are encoded, a call has all of the chunk that its tokens lie in"
            )
        full = segment.end // chunk_size
        for index in range(segment.begin // chunk_size, full):
            if index * chunk_size >= segment.write_from:
                begins.append(start + index * chunk_size - segment.begin)
                positions.append(index * chunk_size)
                chunks.append(segment.chunk_ids[index])
        if segment.tail_slot is not None:
            end = start + segment.end - segment.begin
            tail_slots[start + full * chunk_size - segment.begin : end] = segment.tail_slot
        start += segment.end - segment.begin
    most = max(1, num_tokens // chunk_size)
    return Sealing(
        pad(np.array(begins), most),
        pad(np.array(positions), most),
        pad(np.array(chunks), most, num_chunks),
        tail_slots,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Reads:
    """The parts of a `PrefillPlan` that say which chunks are read."""

    items: WorkItems
    block_tables: np.ndarray
    own_chunk: np.ndarray
    partials: PartialSlots | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Items, chunks of items and slots, as they are padded."""
        slots = self.partials.slots.shape[0] if self.partials is not None else 0
        return self.items.row_begin.shape[0], self.items.chunks.shape[0], slots

    def with_chunks(self, name: Callable[[np.ndarray], np.ndarray]) -> _Reads:
        """With other names for the chunks."""
        items = replace(self.items, chunks=name(np.asarray(self.items.chunks)))
        return replace(self, items=items, block_tables=name(self.block_tables))


def _reads(
    segments: Sequence[Segment],
    num_tokens: int,
    chunk_size: int,
    num_chunks: int,
    options: PlannerOptions,
    least: PrefillShape,
    windows: Sequence[Window | None],
    window_ids: np.ndarray | None,
) -> tuple[_Reads, HiddenTokens | None]:
    """What is read of chunks, and what windows hide of it."""
    table, used = pad_tables([segment.chunk_ids for segment in segments], num_chunks)
    first = np.array([segment.begin for segment in segments])
    last = np.array([segment.end for segment in segments]) - 1
    runs_of = common_runs if options.sharing else lambda _, full: single_rows(full)
    runs = runs_of(table, first // chunk_size)
    reaches = [
        Reach.of(window, first, last, table.shape[1], chunk_size) for window in windows or (None,)
    ]
    blocks = [reach.clip(runs) for reach in reaches]
    listed: list[np.ndarray | None] = [None]  # without windows items cover all before segments
    if windows:
        seen = [reach.read(used) for reach in reaches]
        if options.in_order:
            blocks = [in_order(some, of_all) for some, of_all in zip(blocks, seen, strict=True)]
        listed = [
            of_all & ~covered_mask(table.shape, some)
            for some, of_all in zip(blocks, seen, strict=True)
        ]

    def read(least: PrefillShape) -> list[_Reads]:
        most = max_segments(num_tokens)
        found = []
        for reach, some, by_row in zip(reaches, blocks, listed, strict=True):
            tables = _own_tables(table, by_row, reach, first, most, least, num_chunks)
            items, slots = _items(segments, table, some, num_tokens, num_chunks, options, least)
            found.append(_Reads(items, *tables, slots))
        return found

    reads = read(least)
    if not windows:
        return reads[0], None
    sizes = [one.sizes for one in reads]
    if len(set(sizes)) > 1:
        reads = read(PrefillShape(least.table_width, *map(max, zip(*sizes, strict=True))))
    hidden = [
        reach.hidden(by_row)
        for reach, by_row in zip(reaches, listed, strict=True)
        if by_row is not None
    ]
    reads = with_window_ids(reads, windows, window_ids)
    return stack(reads), hidden_tokens(windows, hidden, max_segments(num_tokens))


def _own_tables(
    table: np.ndarray,
    listed: np.ndarray | None,
    reach: Reach,
    first: np.ndarray,
    most: int,
    least: PrefillShape,
    num_chunks: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The block table of each sequence, and where in it begins what the sequence reads by itself:
    that is moved up to the chunk of its first new token."""
    tables = np.full((most, least.table_width), num_chunks, np.int32)
    tables[: len(table), : table.shape[1]] = table
    own = first // reach.chunk_size
    if listed is None:
        return tables, pad(own, most)
    before = listed & (np.arange(table.shape[1]) < own[:, None])
    count = before.sum(axis=1)
    for row in np.nonzero(count)[0]:
        tables[row, own[row] - count[row] : own[row]] = table[row, before[row]]
    return tables, pad(own - count, most)


def _items(
    segments: Sequence[Segment],
    table: np.ndarray,
    runs: Blocks,
    num_tokens: int,
    num_chunks: int,
    options: PlannerOptions,
    least: PrefillShape,
) -> tuple[WorkItems, PartialSlots | None]:
    """Runs of chunks wholly before segments, once for all segments behind them; rows are tokens."""
    first_token = np.cumsum([0, *(segment.end - segment.begin for segment in segments)])
    begin = first_token[runs.row_begin]
    items = replace(
        items_of(table, runs), row_begin=begin, row_count=first_token[runs.row_end] - begin
    )
    gpu = options.gpu
    if gpu is not None:
        items = cut_for_gpu(items, choose_pieces(items.row_count, items.chunk_count, gpu), gpu)
    padded = flatten_items(items, num_chunks, least.items, least.item_chunks)
    if gpu is None:
        return padded, None
    partials = partial_slots(
        items,
        rows=num_tokens,
        num_items=padded.row_begin.shape[0],
        group=gpu.group,
        align=gpu.align,
        min_slots=least.slots,
    )
    return padded, partials


def next_call(
    work: Sequence[tuple[Owner, Segment]], most_tokens: int = CALL_TOKENS[-1], *, align: int = 1
) -> tuple[list[tuple[Owner, Segment]], int]:
    """The segments of the next prefill call, and the call's tokens, at most `most_tokens`.

    The smallest call that holds all the work, or else the largest. Segments stay with their owners
    and in their order; one that does not fit is cut, at a position that is a multiple of `align`,
    and what is behind it left out.
    """
    wanted = max(
        sum(segment.end - segment.begin for _, segment in work), len(work) * TOKENS_PER_SEQUENCE
    )
    # Not `next`: Ctrl-C in what it leaves of a generator would be lost.
    num_tokens = min([most_tokens, *(size for size in CALL_TOKENS if size >= wanted)])
    ends = ends_of_call([(segment.begin, segment.end) for _, segment in work], num_tokens, align)
    call = [(owner, segment.until(end)) for (owner, segment), end in zip(work, ends, strict=False)]
    return call, num_tokens


def ends_of_call(spans: Sequence[Span], num_tokens: int, align: int = 1) -> list[int]:
    """Up to where a call of `num_tokens` takes each of the first of these spans, in their order.

    One that does not fit is cut at a multiple of `align`; what is behind it may read what is then
    not computed, and is left out.
    """
    ends: list[int] = []
    room = num_tokens
    for begin, end in spans[: max_segments(num_tokens)]:
        cut = min(end, begin + room)
        if cut < end:
            cut -= cut % align
        if cut <= begin:
            break
        ends.append(cut)
        room -= cut - begin
        if cut < end:
            break
    return ends


def max_segments(num_tokens: int) -> int:
    """Segments that a call of `num_tokens` tokens can take."""
    return max(1, num_tokens // TOKENS_PER_SEQUENCE)
