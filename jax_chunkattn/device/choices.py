"""Queries that choose what they read, while a model runs: by step when decoding, by call in
prefill. What does not depend on the layer is made once for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.pool import Pool
from jax_chunkattn.device.read_counts import ReadCounts
from jax_chunkattn.device.selective_pool import SelectivePool
from jax_chunkattn.planning.prefill import QUERY_TILE
from pallas_kernels.plans import DecodePlan, DecodeReads, PrefillPlan, PrefillReads, WorkItems
from pallas_kernels.selection import (
    Asking,
    ItemColumns,
    RowChoice,
    asking_rows,
    asking_tokens,
    blocks_of_tokens,
    choose,
    selected_rows,
    selected_tokens,
)


@dataclass(frozen=True)
class RowChoices:
    """The choices of a decode batch's rows at one step.

    Letters: B rows, K chunks that a query reads.
    """

    spec: CacheSpec
    rows: DecodeRows
    asking: Asking
    item_columns: ItemColumns
    chunk: Int32[Array, " B"]  # that the step's token comes to lie in, counted in its sequence
    number: Int32[Array, " B"]  # of chunks that it reads
    compiled: bool  # whether the kernel that is compiled for this CPU scores chunks

    @classmethod
    def of(
        cls,
        spec: CacheSpec,
        pool: SelectivePool,
        rows: DecodeRows,
        columns: ItemColumns,
        *,
        compiled: bool,
    ) -> RowChoices:
        """Rows choose where their position is a multiple of `refresh`, unless they read all."""
        selector = pool.selector
        items, tables = _choosing_part(spec, pool, rows.plan)
        chunk = rows.lengths // pool.chunk_size
        number = jnp.asarray(selector.counts(tables.shape[1]))[chunk]
        asks = rows.active & (rows.lengths % selector.refresh == 0) & (number <= chunk)
        asking = asking_rows(asks, chunk, tables, items, columns)
        return cls(spec, rows, asking, columns, chunk, number, compiled)

    def apply(
        self, pool: Pool, layer: Int32[Array, ""], q: Float[Array, "B Hq D"], reads: DecodeReads
    ) -> tuple[DecodeReads, SelectivePool]:
        """What the rows read of a layer; and the pool with what they have chosen now."""
        assert isinstance(pool, SelectivePool), "they were made for one"
        tables = self.asking.tables
        selective = pool.selective[layer]
        before = pool.choices(layer, self.rows.slots)
        chosen = _choose(self.spec, pool, layer, q, self.asking, selective, compiled=self.compiled)
        columns = before.at[self.asking.rows].set(
            _of_width(chosen, before.shape[1], tables.shape[1]), mode="drop"
        )
        pool = pool.with_choices(layer, self.rows.slots, columns)
        leaves_out = self.rows.active & (self.number <= self.chunk)
        choice = RowChoice(_all_or(columns, self.number, self.chunk), self.number, self.chunk)
        chosen = selective & leaves_out.any()

        def plan(selected: bool) -> tuple[DecodePlan, ReadCounts]:
            one = selected_rows(
                reads.plan,
                choice,
                tables,
                self.item_columns,
                jnp.array(selected),
                group=self.spec.attention.heads.group,
                chunk_size=pool.chunk_size,
                num_chunks=pool.num_chunks,
                part=part_that_chooses(self.spec),
                compiled=self.compiled,
            )
            return one, self._counts(choice, selected)

        # With a constant in it either program is short: where all read all there is little to do.
        found, counts = lax.cond(chosen, lambda: plan(True), lambda: plan(False))
        return replace(reads, plan=found), pool.counted(layer, counts)

    def _counts(self, choice: RowChoice, selected: bool) -> ReadCounts:
        """What the rows read of a layer: what they chose, or if not `selected` all. Heads with
        windows, which choose nothing, are not looked at."""
        there = jnp.where(self.rows.active, self.chunk + 1, 0)
        read, in_common = there, (jnp.float32(0), jnp.float32(0))
        if selected:
            read = jnp.where(self.rows.active, self.number, 0)
            in_common = choice.agreement(self.item_columns, self.asking.columns)
        sums = there.sum(dtype=jnp.float32), read.sum(dtype=jnp.float32)
        return ReadCounts(*(one[None] for one in (*sums, *in_common)))


@dataclass(frozen=True)
class TokenChoices:
    """The choices of a prefill call's tokens: of the first of each block of them.

    Letters: T packed tokens, A blocks, K chunks that a query reads.
    """

    spec: CacheSpec
    blocks: PrefillPlan
    asking: Asking
    number: Int32[Array, " A"]  # of chunks that a block reads
    slots: Int32[Array, " A"]  # that keep a block's choice; one past the last where none does
    compiled: bool  # whether the kernel that is compiled for this CPU scores chunks

    @classmethod
    def of(
        cls, spec: CacheSpec, pool: SelectivePool, plan: PrefillPlan, *, compiled: bool
    ) -> TokenChoices:
        """Blocks begin where the position is a multiple of `refresh`, and each sequence with one:
        its segment begins with a chunk. The last block of a prompt goes on in decoding."""
        selector, part = pool.selector, part_that_chooses(spec)
        sealing = plan.sealing
        assert sealing is not None, "planned for a pool that makes something of full chunks"
        tokens = len(plan.write_chunks)
        sequence, positions = plan.token_positions(tokens)
        begins = (positions >= 0) & (positions % selector.refresh == 0)
        most = tokens // selector.refresh + plan.block_tables.shape[-2]
        tables, own_chunk, items = plan.block_tables, plan.own_chunk, plan.items
        if part is not None:
            tables, own_chunk, items = tables[part], own_chunk[part], _part(items, part)
        asking = asking_tokens(
            begins,
            positions,
            sequence,
            tables,
            own_chunk,
            items,
            most=most,
            chunk_size=pool.chunk_size,
            num_chunks=pool.num_chunks,
        )
        block = jnp.where(positions >= 0, jnp.cumsum(begins, dtype=jnp.int32) - 1, most)
        counts = jnp.zeros(most, jnp.int32).at[block].add(1, mode="drop")
        number = jnp.asarray(selector.counts(asking.columns))[asking.chunk]
        # The kernel takes tiles of any size; others pad all of them to one.
        together = max(1, QUERY_TILE // selector.refresh) if compiled else 1
        blocks = blocks_of_tokens(plan, asking, counts, positions, number, together=together)
        none = pool.columns.shape[1]
        follows = jnp.append(asking.table[1:] == asking.table[:-1], False)
        follows &= jnp.arange(1, most + 1, dtype=jnp.int32) < asking.count
        slots = jnp.asarray(sealing.tail_slots).at[asking.rows].get(mode="fill", fill_value=none)
        slots = jnp.where(follows, none, slots)
        return cls(spec, blocks, asking, number, slots, compiled)

    def leaves_out(self, pool: Pool, layer: Int32[Array, ""]) -> Bool[Array, ""]:
        """Whether any token reads a part of what is before it."""
        assert isinstance(pool, SelectivePool), "they were made for one"
        return pool.selective[layer] & jnp.any(self.number <= self.asking.chunk)

    def apply(
        self, pool: Pool, layer: Int32[Array, ""], q: Float[Array, "T Hq D"], reads: PrefillReads
    ) -> tuple[PrefillReads, SelectivePool]:
        """What the tokens read of a layer where any `leaves_out` some; and the pool with what the
        last of each prompt chose."""
        assert isinstance(pool, SelectivePool), "they were made for one"
        needed = self.leaves_out(pool, layer)
        chosen = _choose(self.spec, pool, layer, q, self.asking, needed, compiled=self.compiled)
        columns = _all_or(chosen, self.number, self.asking.chunk)
        width = pool.columns.shape[2]
        pool = pool.with_choices(layer, self.slots, _of_width(columns, width, self.asking.columns))
        plan = selected_tokens(
            self.blocks,
            columns,
            self.number,
            self.asking,
            part=part_that_chooses(self.spec),
        )
        tile = QUERY_TILE if self.compiled else pool.selector.refresh
        return replace(reads, plan=plan, query_tile=tile), pool


def item_columns(spec: CacheSpec, pool: Pool, plan: DecodePlan) -> ItemColumns | None:
    """Where rows find what items have, at any step by this plan; None where queries read
    everything: by a plan without tables, or of such a pool."""
    if not isinstance(pool, SelectivePool) or plan.tables is None:
        return None
    return ItemColumns.of(*_choosing_part(spec, pool, plan))


def row_choices(
    spec: CacheSpec,
    pool: Pool,
    rows: DecodeRows,
    columns: ItemColumns | None,
    *,
    compiled: bool,
) -> RowChoices | None:
    """The choices of rows at a step, with their plan's `item_columns`; None where it has none."""
    if columns is None:
        return None
    assert isinstance(pool, SelectivePool), "they are of one"
    return RowChoices.of(spec, pool, rows, columns, compiled=compiled)


def token_choices(
    spec: CacheSpec, pool: Pool, plan: PrefillPlan, *, compiled: bool
) -> TokenChoices | None:
    """The choices of a prefill call's tokens; None for a pool whose queries read everything."""
    if not isinstance(pool, SelectivePool):
        return None
    return TokenChoices.of(spec, pool, plan, compiled=compiled)


def part_that_chooses(spec: CacheSpec) -> int | None:
    """Which part of a plan with windows is of heads that see all; None where there are no windows.

    Heads with windows choose nothing: they read little as it is.
    """
    windows = spec.different_windows
    return windows.index(None) if windows else None


def _choose(
    spec: CacheSpec,
    pool: SelectivePool,
    layer: Int32[Array, ""],
    q: Float[Array, "R Hq D"],
    asking: Asking,
    needed: Bool[Array, ""],
    *,
    compiled: bool,
) -> Int32[Array, "A K"]:
    """What the queries that ask choose, if that is needed."""
    known = pool.landmarks, pool.at_layer(layer), layer
    estimate = pool.kept.estimate(*known)
    if compiled and pool.selector.looks_at_all:
        estimate = pool.kept.compiled_estimate(*known) or estimate

    def anew() -> Int32[Array, "A K"]:
        return choose(q, asking, estimate, spec.attention, pool.selector)

    width = pool.selector.most_read(asking.columns)
    nothing = jnp.zeros((len(asking.rows), width), jnp.int32)
    return lax.cond(needed & (asking.count > 0), anew, lambda: nothing)


def _all_or(
    columns: Int32[Array, "A K"], number: Int32[Array, " A"], chunk: Int32[Array, " A"]
) -> Int32[Array, "A K"]:
    """These columns, but all up to its own for who reads them all."""
    place = jnp.arange(columns.shape[1], dtype=jnp.int32)[None]
    return jnp.where((number > chunk)[:, None], place, columns)


def _of_width(columns: Int32[Array, "A K"], width: int, fill: int) -> Int32[Array, "A width"]:
    """As many columns: tables of calls have room for more or fewer chunks than sequences have."""
    columns = columns[:, :width]
    return jnp.pad(columns, ((0, 0), (0, width - columns.shape[1])), constant_values=fill)


def _choosing_part(
    spec: CacheSpec, pool: SelectivePool, plan: DecodePlan
) -> tuple[WorkItems, Int32[Array, "B P"]]:
    """The items of heads that choose, and the tables of all rows, with some chunk of the pool
    behind a sequence's last."""
    assert plan.tables is not None, "planned for rows that choose"
    items, part = jax.tree.map(jnp.asarray, plan.items), part_that_chooses(spec)
    tables = jnp.minimum(plan.tables, pool.num_chunks - 1)
    return items if part is None else _part(items, part), tables


def _part(items: WorkItems, part: int) -> WorkItems:
    return jax.tree.map(lambda array: array[part], items)
