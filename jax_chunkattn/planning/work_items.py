"""Work items: runs of chunks with their rows, cut into pieces, flattened, and given slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_chunkattn.planning.block_table import Blocks, bucket
from pallas_kernels.plans import PartialSlots, WorkItems


@dataclass(frozen=True)
class Items:
    """Work items before they are padded; several may read the same part of `chunks`.

    Letters: I items, K chunk ids.
    """

    row_begin: np.ndarray  # [I]
    row_count: np.ndarray
    chunk_begin: np.ndarray
    chunk_count: np.ndarray
    chunks: np.ndarray  # [K]

    def __len__(self) -> int:
        return len(self.row_begin)

    def __getitem__(self, which: np.ndarray) -> Items:
        return Items(
            self.row_begin[which],
            self.row_count[which],
            self.chunk_begin[which],
            self.chunk_count[which],
            self.chunks,
        )

    @property
    def chunk_reads(self) -> int:
        """Chunks read by all items together, per layer and KV head."""
        return int(self.chunk_count.sum())


def items_of(table: np.ndarray, blocks: Blocks) -> Items:
    """The blocks of a table, an item each."""
    count = blocks.columns
    begin = np.cumsum(count) - count
    first = blocks.row_begin * table.shape[1] + blocks.column_begin
    chunks = table.ravel()[np.repeat(first - begin, count) + np.arange(count.sum())]
    return Items(blocks.row_begin, blocks.rows, begin, count, chunks)


def row_items(table: np.ndarray, mask: np.ndarray) -> Items:
    """The entries of a table under a mask, an item of one row for each row that has any."""
    count = mask.sum(axis=1)
    rows = np.nonzero(count)[0]
    count = count[rows]
    return Items(rows, np.ones_like(rows), np.cumsum(count) - count, count, table[mask])


def join_items(first: Items, second: Items) -> Items:
    """All items of both, in order."""
    begins = np.append(first.chunk_begin, second.chunk_begin + len(first.chunks))
    return Items(
        np.append(first.row_begin, second.row_begin),
        np.append(first.row_count, second.row_count),
        begins,
        np.append(first.chunk_count, second.chunk_count),
        np.append(first.chunks, second.chunks),
    )


def cut_items(items: Items, pieces: np.ndarray, max_rows: int | None) -> Items:
    """Cuts item i into `pieces[i]` runs of nearly equal length, and its rows into tiles of at most
    `max_rows`. All tiles of a piece are neighbours, so that the first to read a chunk warms the
    cache for the others, and so are all pieces of an item."""
    tiles = -(-items.row_count // max_rows) if max_rows else np.ones_like(items.row_count)
    number = tiles * pieces
    if number.sum() == len(items):
        return items
    item = np.repeat(np.arange(len(items)), number)
    place = np.arange(len(item)) - np.repeat(np.cumsum(number) - number, number)
    piece, tile = np.divmod(place, tiles[item])
    length, parts = items.chunk_count[item], pieces[item]
    begin = length * piece // parts
    first_row = tile * (max_rows or 0)
    rows = items.row_count[item] - first_row
    return Items(
        items.row_begin[item] + first_row,
        np.minimum(rows, max_rows) if max_rows else rows,
        items.chunk_begin[item] + begin,
        length * (piece + 1) // parts - begin,
        items.chunks,
    )


def flatten_items(items: Items, num_chunks: int, min_items: int, min_chunks: int) -> WorkItems:
    """Work items as padded int32 arrays."""
    size = bucket(len(items), min_items)
    return WorkItems(
        row_begin=pad(items.row_begin, size),
        row_count=pad(items.row_count, size),
        chunk_begin=pad(items.chunk_begin, size),
        chunk_count=pad(items.chunk_count, size),
        chunks=pad(items.chunks, bucket(len(items.chunks), min_chunks), num_chunks),
        count=np.asarray(len(items), np.int32),
    )


def partial_slots(
    items: Items, *, rows: int, num_items: int, group: int, align: int, min_slots: int
) -> PartialSlots:
    """Slots for every row of every item, and where each of `rows` rows finds its own.

    An item's slots hold a multiple of `align` flattened rows (rows x `group`), or at least the
    multiple's beginning lies in them: a kernel may write whole tiles of that many and never reach
    the next item's. The number of slots is padded to a power of two.
    """
    flattened = -(-items.row_count * group // align) * align
    reserved = -(-flattened // group)
    first = np.cumsum(reserved) - reserved
    ends = np.cumsum(items.row_count)
    inside = np.arange(items.row_count.sum()) - np.repeat(ends - items.row_count, items.row_count)
    row = np.repeat(items.row_begin, items.row_count) + inside
    slot = np.repeat(first, items.row_count) + inside
    row_begin = np.zeros(rows + 1, np.int32)
    row_begin[1:] = np.cumsum(np.bincount(row, minlength=rows))
    size = bucket(int(reserved.sum()), min_slots)
    return PartialSlots(
        item_slot=pad(first, num_items),
        row_begin=row_begin,
        slots=pad(slot[np.argsort(row, kind="stable")], size),
    )


def pad(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    """`values` as int32 [size], followed by `fill`."""
    padded = np.full(size, fill, np.int32)
    padded[: len(values)] = values
    return padded
