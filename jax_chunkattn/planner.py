"""The planner: which chunks are read once for many rows, and which by each row alone.

It works on the block tables of the batch, rows in the tree's depth-first order, so two neighbours
have the same chunk in a column exactly as far as their prefixes agree. Everything is a few NumPy
passes over `[B, P]`: its cost must stay far below a decode step's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pallas_kernels.plans import DecodePlan, WorkItems

WorthSharing = Callable[[np.ndarray, np.ndarray], np.ndarray]
WorkItem = tuple[int, int, np.ndarray]  # row_begin, row_count, chunks


@dataclass(frozen=True)
class PlannerOptions:
    """How work is cut.

    Attributes:
      sharing: False plans every row by itself, which is paged attention.
      item_overhead, item_read: cost of a work item, and of each chunk it reads, where 1 is what a
        row's own read of a private chunk costs. A run of chunks becomes an item when that is
        cheaper than every row's reading it. The defaults are the XLA implementation's on 2 CPU
        cores: about 9 us an item and 8 to 10 us a chunk against 3.4 (D = 128, C = 64, float32).
      worth_sharing: overrides that rule: (rows, chunks) of every candidate -> bool of each.
      max_item_chunks, max_item_rows: cut items longer or taller than this; None leaves them whole.
    """

    sharing: bool = True
    item_overhead: float = 3.0
    item_read: float = 2.5
    worth_sharing: WorthSharing | None = None
    max_item_chunks: int | None = None
    max_item_rows: int | None = None


@dataclass(frozen=True)
class PlanSummary:
    """What the planner decided, for logs, statistics and results.

    Attributes:
      shared: whether any chunk is read once for several rows.
      reason: why, in words.
      shared_items: work items that cover more than one row; `private_items` cover one row.
      chunk_reads: chunks read per layer and KV head by this plan.
      unshared_chunk_reads: the same if every row read its own.
      common_tokens: tokens, in full chunks, of the longest prefix that two rows have in common,
        whether or not reading it once was found to pay.
    """

    shared: bool
    reason: str
    shared_items: int
    private_items: int
    chunk_reads: int
    unshared_chunk_reads: int
    common_tokens: int


@dataclass(frozen=True)
class PlanShape:
    """The padded sizes of a plan, which decide the compiled program that runs it."""

    rows: int = 1
    items: int = 16
    item_chunks: int = 256
    private_chunks: int = 16

    @classmethod
    def of(cls, plan: DecodePlan) -> PlanShape:
        return cls(
            plan.private_chunks.shape[0],
            plan.items.row_begin.shape[0],
            plan.items.chunks.shape[0],
            plan.private_chunks.shape[1],
        )


@dataclass(frozen=True)
class _Items:
    """Candidate work items: runs of consecutive columns with one row range."""

    row_begin: np.ndarray
    row_count: np.ndarray
    column_begin: np.ndarray
    column_count: np.ndarray

    def __getitem__(self, which: np.ndarray) -> _Items:
        return _Items(
            self.row_begin[which],
            self.row_count[which],
            self.column_begin[which],
            self.column_count[which],
        )


def plan_decode(
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    chunk_size: int,
    num_chunks: int,
    options: PlannerOptions = PlannerOptions(),
    at_least: PlanShape = PlanShape(),
) -> tuple[DecodePlan, PlanSummary]:
    """Plans the two phases for rows in depth-first order.

    Args:
      tables: for each row the chunks of its sequence in order: full ones, the tail, and chunks
        reserved for tokens to come.
      lengths: tokens already in those chunks; only chunks filled by them may be shared.
      chunk_size: tokens a chunk holds.
      num_chunks: chunks in the pool; that number pads the plan.
      options: how work is cut.
      at_least: sizes to pad to; the shape of the last plan lets its program run this one too.

    Returns:
      The plan, padded to powers of two in every dimension (rows too), and what was decided.
    """
    table = _pad_rows(tables, num_chunks)
    full = np.asarray(lengths, np.int32) // chunk_size
    candidates = _common_runs(table, full)
    several = candidates.row_count > 1
    shared = candidates[several & _worth_sharing(candidates, options)]
    in_item = _covered(table.shape, shared)

    private_full = full - in_item.sum(axis=1)
    cutoff = _private_cutoff(private_full, options)
    used = np.fromiter(map(len, tables), np.int32, len(tables))
    private, runs = _split_private(table, used, in_item, private_full - cutoff)

    items = _work_items(table, shared) + [(row, 1, chunks) for row, chunks in runs]
    plan = _assemble(
        _cut(items, options),
        private=private,
        covered=(in_item.sum(axis=1) + np.maximum(private_full - cutoff, 0)) * chunk_size,
        num_chunks=num_chunks,
        at_least=at_least,
    )
    common = candidates[several]
    summary = _summarise(shared, len(runs), common, in_item, full, chunk_size, options)
    return plan, summary


def bucket(size: int, minimum: int = 1) -> int:
    """The power of two that `size` is padded to, at least `minimum`."""
    return max(minimum, 1 << max(0, size - 1).bit_length())


def _pad_rows(tables: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    width = max(map(len, tables))
    table = np.full((len(tables), width), fill, np.int32)
    for row, chunks in enumerate(tables):
        table[row, : len(chunks)] = chunks
    return table


def _common_runs(table: np.ndarray, full: np.ndarray) -> _Items:
    """Maximal runs of full chunks that one row, or one range of rows, has in common."""
    rows, width = table.shape
    row = np.arange(rows, dtype=np.int32)[:, None]
    is_full = np.arange(width) < full[:, None]
    same = np.zeros((rows, width), bool)  # as the row above
    same[1:] = (table[1:] == table[:-1]) & is_full[1:] & is_full[:-1]
    np.logical_and.accumulate(same, axis=1, out=same)
    first_of_next = np.where(same, rows, row)  # the first row after this one that differs
    end = np.full((rows, width), rows, np.int32)
    end[:-1] = np.minimum.accumulate(first_of_next[:0:-1], axis=0)[::-1]
    starts = is_full & ~same
    new = starts.copy()
    new[:, 1:] &= ~starts[:, :-1] | (end[:, 1:] != end[:, :-1])
    row_begin, column_begin = np.nonzero(new)
    run_of = np.cumsum(new.ravel()) - 1
    column_count = np.bincount(run_of[starts.ravel()], minlength=len(row_begin))
    row_count = end[row_begin, column_begin] - row_begin
    return _Items(row_begin, row_count, column_begin, column_count)


def _worth_sharing(items: _Items, options: PlannerOptions) -> np.ndarray:
    if not options.sharing:
        return np.zeros(len(items.row_begin), bool)
    if options.worth_sharing is not None:
        return options.worth_sharing(items.row_count, items.column_count)
    item = options.item_overhead + options.item_read * items.column_count
    return items.row_count * items.column_count > item


def _covered(shape: tuple[int, ...], items: _Items) -> np.ndarray:
    covered = np.zeros(shape, bool)
    for row, rows, column, columns in zip(
        items.row_begin, items.row_count, items.column_begin, items.column_count, strict=True
    ):
        covered[row : row + rows, column : column + columns] = True
    return covered


def _private_cutoff(private_full: np.ndarray, options: PlannerOptions) -> int:
    """Most private chunks a row keeps in the sequence-first phase, which runs all rows as long as
    its longest: the rest of a longer row is cheaper as an item of that row."""
    keep = np.unique(np.append(private_full, 0))[::-1]  # of equals the one with fewer items
    beyond = np.maximum(private_full - keep[:, None], 0)
    items = options.item_read * beyond + options.item_overhead * (beyond > 0)
    return int(keep[np.argmin(keep * len(private_full) + items.sum(axis=1))])


def _split_private(
    table: np.ndarray, used: np.ndarray, in_item: np.ndarray, to_item: np.ndarray
) -> tuple[list[np.ndarray], list[tuple[int, np.ndarray]]]:
    """Chunks each row reads by itself, and the beginnings of long rows that become items."""
    private, runs = [], []
    for row in range(len(table)):
        own = table[row, : used[row]][~in_item[row, : used[row]]]
        if to_item[row] > 0:
            runs.append((row, own[: to_item[row]]))
            own = own[to_item[row] :]
        private.append(own)
    return private, runs


def _work_items(table: np.ndarray, items: _Items) -> list[WorkItem]:
    return [
        (int(row), int(rows), table[row, column : column + columns])
        for row, rows, column, columns in zip(
            items.row_begin, items.row_count, items.column_begin, items.column_count, strict=True
        )
    ]


def _cut(items: list[WorkItem], options: PlannerOptions) -> list[WorkItem]:
    """Cuts items into pieces of at most max_item_rows by max_item_chunks."""
    if options.max_item_rows is None and options.max_item_chunks is None:
        return items
    pieces = []
    for row, rows, chunks in items:
        tall = options.max_item_rows or rows
        long = options.max_item_chunks or len(chunks)
        for first in range(0, rows, tall):
            for begin in range(0, len(chunks), long):
                part = chunks[begin : begin + long]
                pieces.append((row + first, min(tall, rows - first), part))
    return pieces


def _assemble(
    items: list[WorkItem],
    private: list[np.ndarray],
    covered: np.ndarray,
    num_chunks: int,
    at_least: PlanShape,
) -> DecodePlan:
    rows = bucket(len(private), at_least.rows)
    width = bucket(max(map(len, private)), at_least.private_chunks)
    table = np.full((rows, width), num_chunks, np.int32)
    for row, own in enumerate(private):
        table[row, : len(own)] = own
    return DecodePlan(
        items=flatten_items(items, num_chunks, at_least.items, at_least.item_chunks),
        private_chunks=table,
        covered_tokens=_pad(covered, rows),
    )


def flatten_items(
    items: Sequence[WorkItem], num_chunks: int, min_items: int, min_chunks: int
) -> WorkItems:
    """Work items as padded arrays."""
    size = bucket(len(items), min_items)
    counts = np.array([len(chunks) for _, _, chunks in items], np.int32)
    flat = np.concatenate([chunks for _, _, chunks in items] or [np.zeros(0, np.int32)])
    return WorkItems(
        row_begin=_pad([row for row, _, _ in items], size),
        row_count=_pad([rows for _, rows, _ in items], size),
        chunk_begin=_pad(np.cumsum(counts) - counts, size),
        chunk_count=_pad(counts, size),
        chunks=_pad(flat, bucket(len(flat), min_chunks), num_chunks),
        count=np.asarray(len(items), np.int32),
    )


def common_items(tables: Sequence[Sequence[int]], full: Sequence[int]) -> list[WorkItem]:
    """Every full chunk once, in the largest runs that one range of rows has in common.

    `full[b]` chunks of `tables[b]` are considered; equal tables must be neighbours.
    """
    table = _pad_rows(tables, -1)
    return _work_items(table, _common_runs(table, np.asarray(full, np.int32)))


def _pad(values: Sequence[int] | np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    padded = np.full(size, fill, np.int32)
    padded[: len(values)] = values
    return padded


def _summarise(
    shared: _Items,
    private_items: int,
    common: _Items,
    in_item: np.ndarray,
    full: np.ndarray,
    chunk_size: int,
    options: PlannerOptions,
) -> PlanSummary:
    unshared_reads = int(full.sum())
    reads = int(unshared_reads - in_item.sum() + shared.column_count.sum())
    has_items = len(shared.row_begin) > 0
    if has_items:
        reason = f"{unshared_reads - reads} of {unshared_reads} chunk reads saved"
    elif not options.sharing:
        reason = "sharing is switched off"
    elif len(common.row_begin):
        reason = "the common prefixes are too short to pay for a work item"
    else:
        reason = "no two rows have a full chunk in common"
    longest = (common.column_begin + common.column_count).max(initial=0)
    return PlanSummary(
        shared=has_items,
        reason=reason,
        shared_items=len(shared.row_begin),
        private_items=private_items,
        chunk_reads=reads,
        unshared_chunk_reads=unshared_reads,
        common_tokens=int(longest) * chunk_size,
    )
