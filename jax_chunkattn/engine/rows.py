"""The plan of the rows that decode, made anew only when they or their chunks have changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from jax_chunkattn.engine.requests import Request
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.planning.planner import (
    PlannerOptions,
    PlanShape,
    PlanSummary,
    bucket,
    plan_decode,
)
from jax_chunkattn.tree.prefix_tree import PrefixTree
from pallas_kernels import DecodePlan
from pallas_kernels.windows import Window

TOO_MANY_ITEMS = "the plan that shares has more work items than the compiled programs have room for"


class PlannedRows:
    """Plans decode calls, and keeps the number of their shapes small.

    For each number of rows, a power of two, there is one shape, with room for rows of at most
    `columns` chunks each. Room costs nothing on a CPU. On a GPU it does, and there, until the
    shapes are fixed, plans only ever grow: a size that was needed once is kept, so that after a
    while every plan fits a program that is there. Where a row has more than `tables_beyond` chunks,
    plans have the rows' tables; for None never.
    """

    def __init__(
        self,
        options: PlannerOptions,
        stats: EngineStats,
        columns: int,
        windows: Sequence[Window | None] = (),
        *,
        tables_beyond: int | None = None,
    ):
        self._options = options
        self._windows = windows
        self._stats = stats
        self._columns = columns
        self._tables_beyond = tables_beyond
        self._plan: DecodePlan | None = None
        self._reads = 0, 0
        self._key: object = None
        self._shapes: dict[int, PlanShape] = {}
        self._fixed = options.gpu is None
        self._last_rows = 1

    def forget(self) -> None:
        """The next plan is made anew."""
        self._plan = self._key = None

    def resize(self, columns: int) -> None:
        """Rows may have so many chunks from now on."""
        self._columns = columns
        self._shapes.clear()
        self._fixed = self._options.gpu is None
        self.forget()

    def fix_shapes(self, most_rows: int) -> list[PlanShape]:
        """From now on there is one shape for each number of rows; returns them all.

        A plan that shares more than its shape has room for is made without sharing.
        """
        self._fixed = True
        self._shapes.clear()
        self.forget()
        return [self._shape(1 << power) for power in range(bucket(most_rows).bit_length())]

    def plan(self, tree: PrefixTree, running: list[Request]) -> DecodePlan:
        """The plan of these requests, which stand in the tree's depth-first order."""
        key = (id(tree), tree.version, [id(request) for request in running])
        if self._plan is None or key != self._key:
            self._plan = self._plan_anew(tree, running)
            self._key = key
        reads, unshared = self._reads
        self._stats.planned_reads += reads
        self._stats.planned_reads_unshared += unshared
        return self._plan

    def _plan_anew(self, tree: PrefixTree, running: list[Request]) -> DecodePlan:
        began = time.perf_counter()
        stats = self._stats
        wanted = self._shape_to_keep(len(running))
        plan, summary = self._plan_rows(tree, running, self._options, wanted)
        if self._fixed and PlanShape.of(plan) != wanted:
            unshared = replace(self._options, sharing=False)
            plan, summary = self._plan_rows(tree, running, unshared, wanted)
            summary = replace(summary, reason=TOO_MANY_ITEMS)
        shape = PlanShape.of(plan)
        self._shapes[shape.rows] = shape
        self._last_rows = shape.rows
        stats.plans += 1
        stats.plans_shared += summary.shared
        self._reads = summary.chunk_reads, summary.unshared_chunk_reads
        stats.plan_seconds += time.perf_counter() - began
        stats.shared_tokens = max(stats.shared_tokens, summary.common_tokens)
        known = stats.plan
        if known is None or summary.unshared_chunk_reads >= known.unshared_chunk_reads:
            stats.plan = summary
        return plan

    def _plan_rows(
        self,
        tree: PrefixTree,
        running: list[Request],
        options: PlannerOptions,
        at_least: PlanShape,
    ) -> tuple[DecodePlan, PlanSummary]:
        tables = [request.placed.chunk_table for request in running]
        beyond = self._tables_beyond
        with_tables = beyond is not None and max(map(len, tables)) > beyond
        return plan_decode(
            tables,
            [request.placed.num_tokens for request in running],
            chunk_size=tree.chunk_size,
            num_chunks=tree.num_chunks,
            options=options,
            at_least=at_least,
            windows=self._windows,
            columns=self._columns if with_tables else None,
            window_ids=tree.window_ids,
        )

    def _shape_to_keep(self, rows: int) -> PlanShape:
        """The last plan's number of rows, until three quarters of them have left: their program
        runs fewer rows too. Its other sizes are the only ones there are, where shapes are fixed,
        or else the largest needed so far."""
        wanted = bucket(rows)
        if rows * 4 > self._last_rows:
            wanted = max(wanted, self._last_rows)
        return self._shape(wanted)

    def _shape(self, rows: int) -> PlanShape:
        if rows not in self._shapes and self._fixed:
            self._shapes[rows] = PlanShape.largest(rows, self._columns, self._options)
        return self._shapes.get(rows, PlanShape(rows=rows))
