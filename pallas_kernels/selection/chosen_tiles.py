"""What the rows of a decode batch have chosen of what items have, as tiles: each chunk with a few
of the rows that have chosen it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.plans import ChosenTiles
from pallas_kernels.selection.asking import ItemColumns

TILE_QUERIES = 24
"""Query rows of a tile, on 2 cores (9 query heads and 3 of head_dim 64, 16,384 tokens): tiles of 12
took 12.9 ms and of 24 took 8.7, though 27% more of them is padding."""
COMPILED_TILE_QUERIES = 96
"""The same for the kernel that is compiled for this CPU, which pads nothing."""
TILE_READS = 2
"""What a tile costs, in chunks that a row reads by itself (1.5 of the same measurement, and there
has to be room for as many tiles as may be worth it)."""


@dataclass(frozen=True)
class RowChoice:
    """What the rows of a decode batch read: chunks by their place in the row's sequence, the first
    `number` of `columns` in ascending order, of which the last is `chunk`, its own."""

    columns: Int32[Array, "B R"]
    number: Int32[Array, " B"]
    chunk: Int32[Array, " B"]

    def of_items(self, item_columns: ItemColumns) -> Bool[Array, "B R"]:
        """Which of them items have."""
        place = jnp.arange(self.columns.shape[1], dtype=jnp.int32)[None]
        there = place < self.number[:, None]
        return there & (self.columns < item_columns.own[:, None])

    def in_items(self, item_columns: ItemColumns, columns: int) -> Bool[Array, "B P"]:
        """The same by column of the row's sequence."""
        row = jnp.arange(len(self.columns), dtype=jnp.int32)[:, None]
        column = jnp.where(self.of_items(item_columns), self.columns, columns)
        none = jnp.zeros((len(self.columns), columns), jnp.bool_)
        return none.at[row, column].set(True, mode="drop")

    def agreement(
        self, item_columns: ItemColumns, columns: int
    ) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        """How many chunks the rows of items read together, and how many one of them in the mean."""
        in_items = self.in_items(item_columns, columns)
        first = in_items & (_rank(in_items, item_columns) == 0)
        each = jnp.where(in_items, 1 / item_columns.rows.astype(jnp.float32), 0)
        return first.sum(dtype=jnp.float32), each.sum()


def chosen_tiles(
    choice: RowChoice,
    tables: Int32[Array, "B P"],
    item_columns: ItemColumns,
    *,
    group: int,
    num_chunks: int,
    compiled: bool = False,
) -> tuple[ChosenTiles, Bool[Array, ""]]:
    """The tiles of what rows have chosen of items, and whether they are worth it: or else there
    may be more than there is room for.

    `group` query heads read a KV head. If `compiled`, made by the kernel that is compiled for this
    CPU, and of as many rows as suit it.
    """
    (batch, columns), most = tables.shape, choice.columns.shape[1]
    size = max(1, min(batch, (COMPILED_TILE_QUERIES if compiled else TILE_QUERIES) // group))
    number = max(1, batch * most // TILE_READS)
    of_items = choice.of_items(item_columns)
    reads = of_items.sum(dtype=jnp.int32)
    if compiled:
        each = of_items.sum(axis=1, dtype=jnp.int32)  # columns ascend, and items come first
        make = import_module("pallas_kernels.native.tiles").tiles_of
        tiles = make(choice.columns, each, tables, number, size, num_chunks)
        return tiles, tiles.count * TILE_READS <= reads
    in_items = choice.in_items(item_columns, columns)
    rank = _rank(in_items, item_columns)
    begins = in_items & (rank % size == 0)
    by_column = begins.sum(axis=0, dtype=jnp.int32)
    first = jnp.cumsum(by_column, dtype=jnp.int32) - by_column
    tile = first[None] + _sum_of_rows_before(begins) + begins.astype(jnp.int32) - 1
    column = jnp.minimum(choice.columns, columns - 1)
    slots = jnp.take_along_axis(tile * size + rank % size, column, axis=1)
    slots = jnp.where(of_items, slots, number * size)
    chunks = jnp.take_along_axis(tables, column, axis=1)
    row = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], slots.shape)
    count = by_column.sum(dtype=jnp.int32)
    tiles = ChosenTiles(
        jnp.full(number, num_chunks, jnp.int32).at[slots // size].set(chunks, mode="drop"),
        jnp.full(number * size, batch, jnp.int32)
        .at[slots]
        .set(row, mode="drop")
        .reshape(number, size),
        count,
    )
    return tiles, count * TILE_READS <= reads


def _rank(in_items: Bool[Array, "B P"], item_columns: ItemColumns) -> Int32[Array, "B P"]:
    """For each row, how many of those before it with the same chunk have chosen that."""
    before = _sum_of_rows_before(in_items)
    return before - jnp.take_along_axis(before, item_columns.first_row, axis=0)


def _sum_of_rows_before(counted: Bool[Array, "B P"]) -> Int32[Array, "B P"]:
    """For each row, in how many rows before it: a product, which a CPU does faster than a sum that
    runs along."""
    rows = len(counted)
    before = jnp.tril(jnp.ones((rows, rows), jnp.float32), -1)
    summed: Float32[Array, "B P"] = before @ counted.astype(jnp.float32)
    return summed.astype(jnp.int32)
