"""Plans that read what was chosen.

Rows that decode go on reading in common what they agree on. On a GPU there is left of an item what
any of its rows has chosen, and each row reads its own part of that: what is read counts. On a CPU
the products count, and each chunk meets the rows that have chosen it. Where they agree on too
little, every row reads its chunks by itself. In prefill every block of tokens has a table of its
own.

Letters: B rows, S sequences, A queries that ask and the blocks of tokens that begin with them, I
items of K chunk ids, P chunks of a sequence, R that are read at most.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.plans import (
    ChosenChunks,
    ChosenTiles,
    DecodePlan,
    HostOrDevice,
    PartialSlots,
    PrefillPlan,
    WorkItems,
)
from pallas_kernels.selection.asking import Asking, ItemColumns
from pallas_kernels.selection.chosen_tiles import RowChoice, chosen_tiles

ITEM_READ, ITEM_ROW_READ = 1.0, 1 / 128
"""What a chunk of an item costs on a GPU, in chunks that a row reads by itself: so much, and so
much more for each query row. What is read counts there."""


def selected_rows(
    plan: DecodePlan,
    choice: RowChoice,
    tables: Int32[Array, "B P"],
    item_columns: ItemColumns,
    chosen: Bool[Array, ""],
    *,
    group: int,
    chunk_size: int,
    num_chunks: int,
    part: int | None = None,
    compiled: bool = False,
) -> DecodePlan:
    """The plan with what its rows have chosen, if `chosen`, or else as it was.

    `group` query heads read a KV head. With `part`, of heads with that window alone. See
    `chosen_tiles` for `compiled`.
    """
    if plan.partials is None:
        tiles, in_common = chosen_tiles(
            choice,
            tables,
            item_columns,
            group=group,
            num_chunks=num_chunks,
            compiled=compiled,
        )
        tiles = replace(tiles, count=jnp.where(chosen & in_common, tiles.count, 0))
        items, tiles = _without_items(plan.items, chosen, part), _among_windows(plan, tiles, part)
    else:
        items, in_common = _chosen_items(
            plan.items,
            choice,
            item_columns,
            tables,
            chosen,
            group=group,
            part=part,
            num_chunks=num_chunks,
        )
        tiles = None
    of_items = choice.of_items(item_columns).sum(axis=1, dtype=jnp.int32)
    skipped = jnp.where(in_common, of_items, 0)
    place = jnp.arange(choice.columns.shape[1], dtype=jnp.int32)[None]
    alone = (choice.number - skipped)[:, None]
    behind = jnp.minimum(place + skipped[:, None], choice.columns.shape[1] - 1)
    column = jnp.take_along_axis(choice.columns, behind, axis=1)
    ids = jnp.take_along_axis(tables, jnp.minimum(column, tables.shape[1] - 1), axis=1)
    ids = jnp.where(place < alone, ids, num_chunks)
    width = max(ids.shape[1], plan.private_chunks.shape[-1])

    def padded(lists: HostOrDevice) -> Array:
        room = [(0, 0)] * (lists.ndim - 1) + [(0, width - lists.shape[-1])]
        return jnp.pad(jnp.asarray(lists), room, constant_values=num_chunks)

    covered = (choice.chunk + 1 - alone[:, 0]) * chunk_size
    return replace(
        plan,
        items=items,
        tiles=tiles,
        private_chunks=_put(padded(plan.private_chunks), padded(ids), chosen, part),
        covered_tokens=_put(jnp.asarray(plan.covered_tokens), covered, chosen, part),
        partials=_without_partials(plan.partials, chosen & ~in_common, part),
    )


def _without_items(items: WorkItems, chosen: Bool[Array, ""], part: int | None) -> WorkItems:
    none = jnp.int32(0)
    return replace(items, count=_put(jnp.asarray(items.count), none, chosen, part))


def _among_windows(plan: DecodePlan, tiles: ChosenTiles, part: int | None) -> ChosenTiles:
    """With an axis over windows where the plan has one: others than that `part` have no tiles."""
    if part is None:
        return tiles
    windows = plan.private_chunks.shape[0]
    return jax.tree.map(
        lambda one: jnp.zeros((windows, *one.shape), one.dtype).at[part].set(one), tiles
    )


def _chosen_items(
    before: WorkItems,
    choice: RowChoice,
    item_columns: ItemColumns,
    tables: Int32[Array, "B P"],
    chosen: Bool[Array, ""],
    *,
    group: int,
    part: int | None,
    num_chunks: int,
) -> tuple[WorkItems, Bool[Array, ""]]:
    """The items with what rows have chosen, if `chosen`; and whether they are worth it."""
    items = jax.tree.map(jnp.asarray, before)
    if part is not None:
        items = jax.tree.map(lambda array: array[part], items)
    in_items = choice.in_items(item_columns, tables.shape[1])
    kept = _items_of(items, in_items, item_columns, num_chunks)
    each = ITEM_READ + kept.row_count.astype(jnp.float32) * (group * ITEM_ROW_READ)
    reads = (kept.chunk_count.astype(jnp.float32) * each).sum()
    in_common = reads < in_items.sum(dtype=jnp.float32)
    return _with_items(before, kept, in_items, chosen, in_common, part), in_common


def _items_of(
    items: WorkItems, in_items: Bool[Array, "B P"], item_columns: ItemColumns, num_chunks: int
) -> WorkItems:
    """Items with what any of their rows has chosen. Two that read the same part of `chunks` still
    do, and then both have what rows of either have chosen."""
    columns, size = in_items.shape[1], items.chunks.shape[0]
    rows_before = jnp.cumsum(in_items, axis=0, dtype=jnp.int32)
    rows_before = jnp.concatenate([jnp.zeros((1, columns), jnp.int32), rows_before])
    wanted = rows_before[items.row_begin + items.row_count] > rows_before[items.row_begin]  # I P
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    used = jnp.arange(len(wanted), dtype=jnp.int32) < items.count
    offset = column - item_columns.first[:, None]
    inside = used[:, None] & (offset >= 0) & (offset < items.chunk_count[:, None])
    entry = jnp.where(inside, items.chunk_begin[:, None] + offset, size)
    of_entry = (
        jnp.zeros(size, jnp.int32).at[entry].set(jnp.broadcast_to(column, entry.shape), mode="drop")
    )
    wanted_entry = jnp.where(wanted, entry, size)
    wanted = jnp.zeros(size, jnp.bool_).at[wanted_entry].set(True, mode="drop")
    before = jnp.cumsum(wanted, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), before])
    moved = jnp.where(wanted, before[:-1], size)
    begin = before[items.chunk_begin]
    return replace(
        items,
        chunk_begin=begin,
        chunk_count=jnp.where(used, before[items.chunk_begin + items.chunk_count] - begin, 0),
        chunks=jnp.full(size, num_chunks, jnp.int32).at[moved].set(items.chunks, mode="drop"),
        chosen=ChosenChunks(
            jnp.zeros(size, jnp.int32).at[moved].set(of_entry, mode="drop"), in_items
        ),
    )


def _with_items(
    before: WorkItems,
    kept: WorkItems,
    in_items: Bool[Array, "B P"],
    chosen: Bool[Array, ""],
    in_common: Bool[Array, ""],
    part: int | None,
) -> WorkItems:
    """`kept` if `chosen`, and none of them unless rows read them in common; or else those of
    `before`, which every row reads as a whole."""
    outer = before.chunks.shape[:-1]
    whole = ChosenChunks(
        jnp.zeros(before.chunks.shape, jnp.int32), jnp.ones((*outer, *in_items.shape), jnp.bool_)
    )
    kept = replace(kept, count=jnp.where(in_common, kept.count, 0))
    old = jax.tree.map(jnp.asarray, replace(before, chosen=whole))
    return jax.tree.map(lambda one, other: _put(one, other, chosen, part), old, kept)


def blocks_of_tokens(
    plan: PrefillPlan,
    asking: Asking,
    counts: Int32[Array, " A"],
    positions: Int32[Array, " T"],
    number: Int32[Array, " A"],
    *,
    together: int = 1,
) -> PrefillPlan:
    """The plan with a tile for each block of tokens that begins with a query that asks, and with
    the tables of these tiles' sequences.

    Of blocks that follow one another and read everything, as the first `number` chunks say, so many
    make one tile: the others' tiles have no tokens.
    """
    counts = _put_together(counts, asking, number > asking.chunk, together)
    hidden = plan.hidden
    if hidden is not None:
        begin, offset = (jnp.asarray(x)[..., asking.table] for x in (hidden.begin, hidden.offset))
        hidden = replace(hidden, begin=begin, offset=offset)
    return replace(
        plan,
        tile_begin=asking.rows,
        tile_count=counts,
        tile_position=positions.at[asking.rows].get(mode="fill", fill_value=0),
        tile_sequence=jnp.arange(len(asking.rows), dtype=jnp.int32),
        num_tiles=asking.count,
        block_tables=jnp.asarray(plan.block_tables)[..., asking.table, :],
        own_chunk=jnp.asarray(plan.own_chunk)[..., asking.table],
        hidden=hidden,
    )


def _put_together(
    counts: Int32[Array, " A"], asking: Asking, whole: Bool[Array, " A"], together: int
) -> Int32[Array, " A"]:
    """Tokens of each block's tile."""
    if together == 1:
        return counts
    block = jnp.arange(len(counts), dtype=jnp.int32)
    goes_on = whole[1:] & whole[:-1] & (asking.table[1:] == asking.table[:-1])
    goes_on = jnp.concatenate([jnp.zeros(1, jnp.bool_), goes_on])
    run = lax.cummax(jnp.where(goes_on, 0, block))
    first = run + (block - run) // together * together
    return jnp.zeros_like(counts).at[first].add(counts)


def selected_tokens(
    blocks: PrefillPlan,
    columns: Int32[Array, "A K"],
    number: Int32[Array, " A"],
    asking: Asking,
    *,
    part: int | None = None,
) -> PrefillPlan:
    """A plan of `blocks_of_tokens` with the chunks in the first `number` of these columns as what
    each block reads.

    In a block's table they stand right before what follows its own chunk, where the others were.
    """
    tables, chosen = asking.tables[asking.table], jnp.array(True)
    begin = asking.chunk + 1 - number
    place = jnp.arange(tables.shape[1], dtype=jnp.int32)[None] - begin[:, None]
    inside = (place >= 0) & (place < number[:, None])
    column = jnp.take_along_axis(columns, jnp.clip(place, 0, columns.shape[1] - 1), axis=1)
    column = jnp.minimum(column, tables.shape[1] - 1)
    items, moved = (
        blocks.items,
        jnp.where(inside, jnp.take_along_axis(tables, column, axis=1), tables),
    )
    return replace(
        blocks,
        items=replace(items, count=_put(jnp.asarray(items.count), jnp.int32(0), chosen, part)),
        block_tables=_put(jnp.asarray(blocks.block_tables), moved, chosen, part),
        own_chunk=_put(jnp.asarray(blocks.own_chunk), begin, chosen, part),
        partials=_without_partials(blocks.partials, chosen, part),
    )


def _without_partials(
    partials: PartialSlots | None, chosen: Bool[Array, ""], part: int | None
) -> PartialSlots | None:
    if partials is None:
        return None
    begin = jnp.asarray(partials.row_begin)
    none = jnp.zeros(begin.shape[-1:], begin.dtype)
    return replace(partials, row_begin=_put(begin, none, chosen, part))


def _put(old: Array, new: Array, chosen: Bool[Array, ""], part: int | None) -> Array:
    """`new` instead of what is there, or of that part of it, if `chosen`."""
    if part is None:
        return jnp.where(chosen, new, old)
    return old.at[part].set(jnp.where(chosen, new, old[part]))
