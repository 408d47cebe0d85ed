"""The planner: which chunks are read once for many rows, and which by each row alone.

It works on the block tables of the batch, rows in the tree's depth-first order. Everything is a few
NumPy passes over `[B, P]` and a walk over the runs of the tree: its cost must stay far below a
decode step's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jax_chunkattn.planning.block_table import (
    Blocks,
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
from jax_chunkattn.planning.reach import Reach, hidden_tokens, stack, with_window_ids
from jax_chunkattn.planning.work_items import flatten_items, pad, partial_slots
from pallas_kernels.plans import DecodePlan
from pallas_kernels.windows import Window

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
      by_window: the same for each window that the plan is for; then the above are of the one that
        reads most.
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
    by_window: tuple[PlanSummary, ...] = ()


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
            plan.num_rows,
            plan.items.row_begin.shape[-1],
            plan.items.chunks.shape[-1],
            plan.private_chunks.shape[-1],
            plan.partials.slots.shape[-1] if plan.partials is not None else 0,
        )

    @classmethod
    def largest_of(cls, shapes: Iterable[PlanShape]) -> PlanShape:
        """The smallest shape that holds plans of all these."""
        return cls(*map(max, *(vars(shape).values() for shape in [cls(), *shapes])))

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
    windows: Sequence[Window | None] = (),
    columns: int | None = None,
    window_ids: np.ndarray | None = None,
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
      windows: of the heads that read by it, each once, None for those that see all. Then the plan
        has a first axis over these, and is good for queries that the rows' chunks have room for.
      columns: most chunks of a row, where rows choose among theirs; then the plan has the tables.
      window_ids: int32 [num_chunks + 1], where heads with windows have chunks of their own, the id
        of each for them, and `num_chunks` of what is nowhere.

    Returns:
      The plan, padded to powers of two in every dimension (rows too), and what was decided.

    Raises:
      ValueError: when the options are for a GPU and another chunk size, chunks hold no token, a
        chunk is not in the pool, a length is no integer, negative, or more than the row's chunks
        hold, or a row has more chunks than `columns`.
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
    first, last = tokens - 1, used.astype(np.int64) * chunk_size - 1
    reaches = [
        Reach.of(window, first, last, table.shape[1], chunk_size) for window in windows or (None,)
    ]
    divide = divide_for_cpu if gpu is None else divide_for_gpu
    divisions = [divide(table, used, full, reach.clip(runs), reach, options) for reach in reaches]
    summaries = [_summary(runs, division, chunk_size) for division in divisions]

    def assemble(shape: PlanShape) -> list[DecodePlan]:
        return [
            _assemble(table, used, reach, division, num_chunks, gpu, shape)
            for reach, division in zip(reaches, divisions, strict=True)
        ]

    plans = assemble(at_least)
    whole = None if columns is None else _whole_tables(table, plans[0], columns, num_chunks)
    if not windows:
        return replace(plans[0], tables=whole), summaries[0]
    shapes = [PlanShape.of(plan) for plan in plans]
    if len(set(shapes)) > 1:
        plans = assemble(PlanShape.largest_of(shapes))
    hidden = [
        reach.hidden(division.private) for reach, division in zip(reaches, divisions, strict=True)
    ]
    plan = replace(
        stack(with_window_ids(plans, windows, window_ids)),
        hidden=hidden_tokens(windows, hidden, PlanShape.of(plans[0]).rows),
        tables=whole,
    )
    most = max(summaries, key=lambda one: one.unshared_chunk_reads)
    return plan, replace(most, by_window=tuple(summaries))


def _whole_tables(table: np.ndarray, plan: DecodePlan, columns: int, num_chunks: int) -> np.ndarray:
    """The tables of all rows, with room for so many chunks."""
    if table.shape[1] > columns:
        raise ValueError(f"a row has {table.shape[1]} chunks, there is room for {columns}")
    padded = np.full((plan.num_rows, columns), num_chunks, np.int32)
    padded[: len(table), : table.shape[1]] = table
    return padded


def _summary(runs: Blocks, division: Division, chunk_size: int) -> PlanSummary:
    common = runs.column_end[runs.rows > 1]
    return PlanSummary(
        shared=division.shared_items > 0,
        reason=division.reason,
        shared_items=division.shared_items,
        private_items=division.private_items,
        chunk_reads=division.chunk_reads,
        unshared_chunk_reads=division.unshared_chunk_reads,
        common_tokens=int(common.max(initial=0)) * chunk_size,
        packing=division.packing,
        seconds=division.seconds,
        unshared_seconds=division.unshared_seconds,
    )


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
    used: np.ndarray,
    reach: Reach,
    division: Division,
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
    left = used - reach.count_read(used)
    return DecodePlan(
        items=items,
        private_chunks=pack_left(
            table, division.private, rows, at_least.private_chunks, num_chunks
        ),
        covered_tokens=pad((division.covered + left) * reach.chunk_size, rows),
        partials=partials,
    )
