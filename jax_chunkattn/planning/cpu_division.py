"""Dividing the work for a CPU: a run is shared when that is cheaper than every row's reading it."""

from __future__ import annotations

import numpy as np

from jax_chunkattn.planning.block_table import Blocks, covered_mask, in_order
from jax_chunkattn.planning.division import (
    NOTHING_IN_COMMON,
    SWITCHED_OFF,
    TOO_SHORT,
    Division,
    chunk_reads_saved,
)
from jax_chunkattn.planning.options import PlannerOptions
from jax_chunkattn.planning.reach import Reach
from jax_chunkattn.planning.work_items import Items, cut_items, items_of, join_items, row_items


def divide_for_cpu(
    table: np.ndarray,
    used: np.ndarray,
    full: np.ndarray,
    runs: Blocks,
    reach: Reach,
    options: PlannerOptions,
) -> Division:
    """Shares the runs that pay, and keeps rows of like lengths in the sequence-first phase.

    Args:
      table: chunks [B, P] of each row, of which `used` are there and `full` are full.
      runs: those that rows have in common, and each row's own; all of their rows see all of them.
      reach: what rows see of their chunks.
    """
    overhead = options.item_overhead / reach.chunk_size
    several = runs.rows > 1
    shared, read = runs[several & _worth_sharing(runs, overhead, options)], reach.read(used)
    if options.in_order:
        shared = in_order(shared, read)
    in_item = covered_mask(table.shape, shared)
    alone = read & ~in_item
    covered = in_item.sum(axis=1, dtype=np.int32)
    left = reach.count_whole(full) - covered
    even_rows = options.even_rows and not options.in_order
    most = _private_cutoff(left, overhead, options) if even_rows else left
    to_item = np.maximum(left - most, 0)
    could = alone if reach.is_all else alone & reach.whole(full)
    long = could & (could.cumsum(axis=1) <= to_item[:, None])
    private_items = row_items(table, long)
    items = _cut(join_items(items_of(table, shared), private_items), options)
    unshared_reads = int(reach.count_read(full).sum())
    reads = unshared_reads - int(covered.sum()) + int(shared.columns.sum())
    if len(shared):
        reason = chunk_reads_saved(reads, unshared_reads)
    elif not options.sharing:
        reason = SWITCHED_OFF
    else:
        reason = TOO_SHORT if several.any() else NOTHING_IN_COMMON
    return Division(
        items,
        private=alone & ~long,
        covered=covered + to_item,
        shared_items=len(shared),
        private_items=len(private_items),
        chunk_reads=reads,
        unshared_chunk_reads=unshared_reads,
        reason=reason,
        packing="runs" if len(shared) else "none",
    )


def _worth_sharing(runs: Blocks, overhead: float, options: PlannerOptions) -> np.ndarray:
    """Of each run; `overhead` of an item in reads of a private chunk."""
    if not options.sharing:
        return np.zeros(len(runs), bool)
    if options.worth_sharing is not None:
        return options.worth_sharing(runs.rows, runs.columns)
    item = overhead + options.item_read * runs.columns
    return runs.rows * runs.columns > item


def _private_cutoff(private_full: np.ndarray, overhead: float, options: PlannerOptions) -> int:
    """Most private chunks a row keeps in the sequence-first phase, which runs all rows as long as
    its longest: the rest of a longer row is cheaper as an item of that row."""
    keep = np.unique(np.append(private_full, 0))[::-1]  # of equals the one with fewer items
    beyond = np.maximum(private_full - keep[:, None], 0)
    items = options.item_read * beyond + overhead * (beyond > 0)
    return int(keep[np.argmin(keep * len(private_full) + items.sum(axis=1))])


def _cut(items: Items, options: PlannerOptions) -> Items:
    """Into pieces of at most max_item_rows by max_item_chunks."""
    longest = options.max_item_chunks or np.maximum(items.chunk_count, 1)
    return cut_items(items, -(-items.chunk_count // longest), options.max_item_rows)
