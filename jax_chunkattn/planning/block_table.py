"""The block table of a batch, the runs of chunks its rows have in common, and blocks cut from it.

Rows are in the tree's depth-first order, so two neighbours have the same chunk in a column exactly
as far as their prefixes agree, and the runs are the nodes of the prefix tree in use.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

ChunkIds = Sequence[int] | np.ndarray
"""The chunks of a row, in order: a list, NumPy's integers, or a buffer such as `array("i")`."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of a table: rows [row_begin, row_end) by columns [column_begin, column_end).

    All rows of a block have the same chunks in its columns. Letters: R blocks.
    """

    row_begin: np.ndarray  # [R]
    column_begin: np.ndarray
    row_end: np.ndarray
    column_end: np.ndarray

    @classmethod
    def of(cls, blocks: Sequence[tuple[int, int, int, int]]) -> Blocks:
        """From the four fields of each block, in their order."""
        flat = np.fromiter(chain.from_iterable(blocks), np.int64, 4 * len(blocks))
        return cls(*flat.reshape(-1, 4).T)

    def __len__(self) -> int:
        return len(self.row_begin)

    def __getitem__(self, which: np.ndarray) -> Blocks:
        return Blocks(*(field[which] for field in vars(self).values()))

    @property
    def rows(self) -> np.ndarray:
        return self.row_end - self.row_begin

    @property
    def columns(self) -> np.ndarray:
        return self.column_end - self.column_begin


def pad_tables(tables: Sequence[ChunkIds], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of unequal lengths as int32 [B, P], `fill` behind each, and the lengths [B].

    Rows that are int32 buffers, such as `array("i")`, cost next to nothing; of lists every number
    is converted, about 40 ns each.

    Raises:
      ValueError: for a chunk id that is no integer, or not one of the `fill` in the pool.
    """
    used = np.fromiter(map(len, tables), np.int32, len(tables))
    flat = _flatten(tables, int(used.sum()))
    if flat.size and flat.view(np.uint32).max() >= fill:  # ids below 0 are the largest of all
        outside = int(np.argmax((flat < 0) | (flat >= fill)))
        row = int(np.searchsorted(used.cumsum(), outside, side="right"))
        raise ValueError(
            f"row {row} has chunk id {flat[outside]} at position "
            f"{outside - int(used[:row].sum())}; the pool's ids go from 0 to {fill - 1}"
        )
    columns = np.arange(used.max(initial=0), dtype=np.int32)
    table = np.full((len(tables), len(columns)), fill, np.int32)
    table[columns < used[:, None]] = flat
    return table, used


def _flatten(tables: Sequence[ChunkIds], size: int) -> np.ndarray:
    if all(map(_is_int32, tables)):
        return np.frombuffer(b"".join(tables), np.int32)  # pyright: ignore[reportArgumentType]
    try:
        return np.fromiter(map(operator.index, chain.from_iterable(tables)), np.int32, size)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"chunk ids must be integers that fit in int32: {error}") from None


def _is_int32(row: Any) -> bool:
    """Whether it is a buffer of int32 numbers, one behind the other."""
    try:
        view = memoryview(row)
    except TypeError:
        return False
    return view.format == "i" and view.itemsize == 4 and view.ndim == 1 and view.contiguous


def common_runs(table: np.ndarray, full: np.ndarray) -> Blocks:
    """Maximal runs of full chunks that one row, or one range of rows, has in common.

    `full[b]` columns of row b are considered. The runs cover each of them once. They come in the
    tree's depth-first order, a run before those below it.
    """
    differs = table[1:] != table[:-1]
    agreeing = np.full(len(table) + 1, 0)
    if differs.size:
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), table.shape[1])
        agreeing[1:-1] = np.minimum(first, np.minimum(full[1:], full[:-1]))
    closed: list[tuple[int, int, int, int]] = []
    path: list[tuple[int, int]] = []  # runs still open: row and column where each begins
    end = 0  # column where the last of them ends
    for row, (agrees, size) in enumerate(zip(agreeing.tolist(), [*full.tolist(), 0], strict=True)):
        while path and path[-1][1] >= agrees:
            begin, column = path.pop()
            closed.append((begin, column, row, end))
            end = column
        if path and end > agrees:  # the last one goes on in fewer columns
            closed.append((path[-1][0], agrees, row, end))
        if size > agrees:
            path.append((row, agrees))
        end = size
    closed.sort()
    return Blocks.of(closed)


def covered_mask(shape: tuple[int, ...], blocks: Blocks) -> np.ndarray:
    """Whether each entry of a table of that shape lies in one of the blocks, which are disjoint."""
    corners = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
    for rows, sign in ((blocks.row_begin, 1), (blocks.row_end, -1)):
        np.add.at(corners, (rows, blocks.column_begin), sign)
        np.add.at(corners, (rows, blocks.column_end), -sign)
    return corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0


def in_order(blocks: Blocks, read: np.ndarray) -> Blocks:
    """Those of disjoint blocks that come before all else that their rows read, bool [B, P]."""
    while True:
        covered = covered_mask(read.shape, blocks)
        late = covered & ((read & ~covered).cumsum(axis=1) > 0)
        if not late.any():
            return blocks
        fields = zip(*(field.tolist() for field in vars(blocks).values()), strict=True)
        early = [not late[row:row_end, begin:end].any() for row, begin, row_end, end in fields]
        blocks = blocks[np.array(early)]


def covered_columns(rows: int, blocks: Blocks) -> np.ndarray:
    """How many columns of each of `rows` rows lie in the blocks."""
    change = np.bincount(blocks.row_begin, blocks.columns, rows + 1)
    change -= np.bincount(blocks.row_end, blocks.columns, rows + 1)
    return change.cumsum()[:-1].astype(np.int32)


def pack_left(
    table: np.ndarray, mask: np.ndarray, rows: int, min_columns: int, fill: int
) -> np.ndarray:
    """The entries under the mask, in order, at the beginning of their rows: int32 [rows, P].

    P is the power of two that holds the longest, at least `min_columns`.
    """
    counts = mask.sum(axis=1)
    columns = bucket(int(counts.max(initial=0)), min_columns)
    packed = np.full((rows, columns), fill, np.int32)
    packed[: len(table)][np.arange(columns) < counts[:, None]] = table[mask]
    return packed


def bucket(size: int, minimum: int = 1) -> int:
    """The power of two that `size` is padded to, at least `minimum`."""
    return max(minimum, 1 << max(0, size - 1).bit_length())
