"""The planner: which chunks are read once for many rows, and which by each row alone.

It works on the block tables of the batch, rows in the tree's depth-first order. Everything is a few
NumPy passes over `[B, P]` and a walk over the runs of the tree: its cost must stay far below a
decode step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_chunkattn.planning.block_table import (
    ChunkIds,
    bucket,
    common_runs,
    pack_left,
    pad_tables,
)
from jax_chunkattn.planning.cpu_division import divide_for_cpu
from jax_chunkattn.planning.division import Division
from jax_chunkattn.planning.gpu_division import divide_for_gpu
from jax_chunkattn.planning.gpu_time import most_items_alone
from jax_chunkattn.planning.options import GpuCosts, GpuWork, PlannerOptions
from jax_chunkattn.planning.work_items import flatten_items, pad, partial_slots
from pallas_kernels.plans import DecodePlan

__all__ = [
    "GpuCosts",
    "GpuWork",
    "PlanShape",
    "PlanSummary",
    "PlannerOptions",
    "bucket",
    "plan_decode",
]


@dataclass(frozen=True)
class PlanSummary:
    """What the planner decided, for logs, statistics and results.

    Attributes:
      shared: whether any chunk is read once for several rows.
      reason: why, in words.
      shared_items: work items that cover more than one row; `private_items` cover one row. Both
        before they are cut.
      chunk_reads: chunks read per layer and KV head by this plan.
      unshared_chunk_reads: the same if every row read its own.
      common_tokens: tokens, in full chunks, of the longest prefix that two rows have in common,
        whether or not reading it once was found to pay.
      packing: the rule that chose the items; "none" when nothing is shared.
      seconds, unshared_seconds: of a layer's attention with this plan and with every row by itself,
        as the planner estimates them for a GPU.
    """

    shared: bool
    reason: str
    shared_items: int
    private_items: int
    chunk_reads: int
    unshared_chunk_reads: int
    common_tokens: int
    packing: str = "none"
    seconds: float | None = None
    unshared_seconds: float | None = None


@dataclass(frozen=True)
class PlanShape:
    """The padded sizes of a plan, which decide the compiled program that runs it.

    `slots` is 0 in plans without partials.
    """

    rows: int = 1
    items: int = 16
    item_chunks: int = 256
    private_chunks: int = 16
    slots: int = 0

    @classmethod
    def of(cls, plan: DecodePlan) -> PlanShape:
        return cls(
            plan.private_chunks.shape[0],
            plan.items.row_begin.shape[0],
            plan.items.chunks.shape[0],
            plan.private_chunks.shape[1],
            plan.partials.slots.shape[0] if plan.partials is not None else 0,
        )

    @classmethod
    def largest(cls, rows: int, columns: int, options: PlannerOptions) -> PlanShape:
        """A shape that holds every plan of `rows` rows, of at most `columns` chunks each.

        On a GPU, where every program of the grid costs something even if it has no work, not every
        plan: all that share nothing, and those that share unless they have unusually many items.
        """
        rows = bucket(rows)
        chunks = rows * columns  # no plan reads a row's chunk twice for it
        if options.gpu is not None:
            items, slots = most_items_alone(rows, rows, columns, options.gpu)
        else:
            # A tree with B leaves has fewer than 2 B runs, each of which may be cut.
            pieces = chunks // options.max_item_chunks if options.max_item_chunks else 0
            tiles = -(-rows // options.max_item_rows) if options.max_item_rows else 1
            items, slots = (2 * rows + pieces) * tiles, 0
        return cls(
            rows=rows,
            items=bucket(items, cls.items),
            item_chunks=bucket(chunks, cls.item_chunks),
            private_chunks=bucket(columns, cls.private_chunks),
            slots=slots and bucket(slots),
        )


def plan_decode(
    tables: Sequence[ChunkIds],
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
        reserved for tokens to come. Rows may be lists, or int32 buffers such as `array("i")`, which
        is faster.
      lengths: tokens already in those chunks; only chunks filled by them may be shared.
      chunk_size: tokens a chunk holds.
      num_chunks: chunks in the pool; that number pads the plan.
      options: how work is cut, and for which device. A plan for a GPU has slots for partials.
      at_least: sizes to pad to; the shape of the last plan lets its program run this one too.

    Returns:
      The plan, padded to powers of two in every dimension (rows too), and what was decided.

    Raises:
      ValueError: when the options are for a GPU and another chunk size, chunks hold no token, a
        chunk is not in the pool, or a length is no integer, negative, or more than the row's chunks
        hold.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    gpu = options.gpu
    if gpu is not None and gpu.chunk_size != chunk_size:
        raise ValueError(
            f"the options are for chunks of {gpu.chunk_size} tokens, the tables' have {chunk_size}"
        )
    table, used = pad_tables(tables, num_chunks)
    tokens = _lengths(lengths, len(table))
    if np.any(tokens > used * chunk_size):
        row = int(np.argmax(tokens > used * chunk_size))
        raise ValueError(
            f"row {row} has {tokens[row]:,} tokens, its {used[row]} chunks hold "
            f"{used[row] * chunk_size:,}"
        )
    full = (tokens // chunk_size).astype(np.int32)
    runs = common_runs(table, full)
    if gpu is not None:
        division = divide_for_gpu(table, used, full, runs, options)
    else:
        division = divide_for_cpu(table, used, full, runs, chunk_size, options)
    plan = _assemble(table, division, chunk_size, num_chunks, options.gpu, at_least)
    common = runs.column_end[runs.rows > 1]
    summary = PlanSummary(
        shared=division.shared_items > 0,
        reason=division.reason,
        shared_items=division.shared_items,
        private_items=division.private_items,
        chunk_reads=division.chunk_reads,
        unshared_chunk_reads=int(full.sum()),
        common_tokens=int(common.max(initial=0)) * chunk_size,
        packing=division.packing,
        seconds=division.seconds,
        unshared_seconds=division.unshared_seconds,
    )
    return plan, summary


def _lengths(lengths: Sequence[int], rows: int) -> np.ndarray:
    """Checked lengths of that many rows, int64 [B]."""
    tokens = np.asarray(lengths)
    if tokens.shape != (rows,):
        raise ValueError(f"{rows} tables need as many lengths, got shape {tokens.shape}")
    if rows and not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"lengths must be integers, got {tokens.dtype}")
    if tokens.min(initial=0) < 0:
        row = int(np.argmax(tokens < 0))
        raise ValueError(f"row {row} has {tokens[row]} tokens")
    return tokens.astype(np.int64)


def _assemble(
    table: np.ndarray,
    division: Division,
    chunk_size: int,
    num_chunks: int,
    gpu: GpuWork | None,
    at_least: PlanShape,
) -> DecodePlan:
    rows = bucket(len(table), at_least.rows)
    items = flatten_items(division.items, num_chunks, at_least.items, at_least.item_chunks)
    partials = None
    if gpu is not None:
        partials = partial_slots(
            division.items,
            rows=rows,
            num_items=items.row_begin.shape[0],
            group=gpu.group,
            align=gpu.align,
            min_slots=at_least.slots,
        )
    return DecodePlan(
        items=items,
        private_chunks=pack_left(
            table, division.private, rows, at_least.private_chunks, num_chunks
        ),
        covered_tokens=pad(division.covered * chunk_size, rows),
        partials=partials,
    )
