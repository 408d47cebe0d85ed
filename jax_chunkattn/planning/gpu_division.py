"""Dividing the work for a GPU: packed by a rule, cut to fill the device, and compared with not
sharing at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_chunkattn.planning.block_table import Blocks, covered_columns, covered_mask
from jax_chunkattn.planning.division import (
    NOTHING_IN_COMMON,
    SWITCHED_OFF,
    TOO_SHORT,
    Division,
    chunk_reads_saved,
)
from jax_chunkattn.planning.gpu_time import choose_pieces, plan_time
from jax_chunkattn.planning.options import GpuWork, PlannerOptions
from jax_chunkattn.planning.packing import (
    RULES,
    costs_more_by_rows,
    pack,
    single_rows,
    split_rows,
    when_worth,
    without_private,
)
from jax_chunkattn.planning.reach import Reach
from jax_chunkattn.planning.work_items import Items, cut_items, items_of


@dataclass(frozen=True)
class _Cut:
    """Blocks that become items, the pieces each is cut into, and what that comes to."""

    blocks: Blocks
    pieces: np.ndarray  # [R]
    covered: np.ndarray  # [B] columns of each row
    seconds: float

    @classmethod
    def of(cls, blocks: Blocks, read: np.ndarray, gpu: GpuWork) -> _Cut:
        """Of rows that read so many full chunks each."""
        pieces = choose_pieces(blocks.rows, blocks.columns, gpu)
        covered = covered_columns(len(read), blocks)
        time = plan_time(blocks, pieces, read, covered, gpu)
        return cls(blocks, pieces, covered, time * gpu.chunk_seconds)


def divide_for_gpu(
    table: np.ndarray,
    used: np.ndarray,
    full: np.ndarray,
    runs: Blocks,
    reach: Reach,
    options: PlannerOptions,
) -> Division:
    """Takes the plan that shares if it is estimated to be the faster one.

    `worth_sharing`, if given, decides instead. Args as for `divide_for_cpu`.
    """
    gpu = options.gpu
    assert gpu is not None
    read = reach.count_read(full)
    alone = without_private(reach.clip(single_rows(full)), full, gpu, anywhere=not reach.is_all)
    unshared = _Cut.of(alone, read, gpu)
    chosen, reason = unshared, ""
    if not options.sharing:
        reason = SWITCHED_OFF
    elif not (runs.rows > 1).any():
        reason = NOTHING_IN_COMMON
    else:
        blocks = _packed(runs, full, reach, options, gpu)
        shared = _Cut.of(blocks, read, gpu)
        if not (blocks.rows > 1).any():
            reason = TOO_SHORT
        elif options.worth_sharing is None and shared.seconds >= unshared.seconds:
            reason = f"sharing saves nothing: an estimated {_versus(shared, unshared)}"
        else:
            chosen = shared
    items = cut_for_gpu(items_of(table, chosen.blocks), chosen.pieces, gpu)
    unshared_reads = int(read.sum())
    reads = items.chunk_reads + int((read - chosen.covered).sum())
    if chosen is not unshared:
        saved = chunk_reads_saved(reads, unshared_reads)
        reason = f"{saved}, an estimated {_versus(chosen, unshared)}"
    several = int((chosen.blocks.rows > 1).sum())
    private = reach.read(used)
    if reach.is_all:  # items cover each row from its first column on
        private &= np.arange(table.shape[1]) >= chosen.covered[:, None]
    else:
        private &= ~covered_mask(table.shape, chosen.blocks)
    rule = gpu.packing if options.worth_sharing is None else "worth_sharing"
    return Division(
        items,
        private=private,
        covered=chosen.covered,
        shared_items=several,
        private_items=len(chosen.blocks) - several,
        chunk_reads=reads,
        unshared_chunk_reads=unshared_reads,
        reason=reason,
        packing=rule if several else "none",
        seconds=chosen.seconds,
        unshared_seconds=unshared.seconds,
    )


def cut_for_gpu(items: Items, pieces: np.ndarray, gpu: GpuWork) -> Items:
    """Items cut to query tiles and pieces, longest first: the order in which programs start."""
    order = np.argsort(-items.chunk_count // pieces, kind="stable")
    return cut_items(items[order], pieces[order], gpu.tile_rows)


def _packed(
    runs: Blocks, full: np.ndarray, reach: Reach, options: PlannerOptions, gpu: GpuWork
) -> Blocks:
    worth = options.worth_sharing
    if not reach.is_all:  # no run need begin where the one above it ends: each is an item, or none
        pays = runs.rows == 1
        pays |= costs_more_by_rows(runs, gpu) if worth is None else worth(runs.rows, runs.columns)
        return without_private(runs[pays], full, gpu, anywhere=True)
    if worth is None:
        blocks = pack(runs, RULES[gpu.packing](gpu))
        return without_private(blocks, full, gpu, several=gpu.packing == "cost")
    blocks = pack(runs, when_worth(worth))
    blocks = split_rows(blocks, (blocks.rows > 1) & ~worth(blocks.rows, blocks.columns))
    return without_private(blocks, full, gpu)


def _versus(shared: _Cut, unshared: _Cut) -> str:
    return f"{shared.seconds * 1e6:.1f} us against {unshared.seconds * 1e6:.1f}"
