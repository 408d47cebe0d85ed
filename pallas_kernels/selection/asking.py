"""The queries that choose anew, and where the chunks before each of them are.

Letters: A queries that ask, R queries of the call, S sequences, P chunks of a sequence, I items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.plans import HostOrDevice, WorkItems


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asking:
    """Queries that choose, in the order of the call's.

    Items are those of the plan, with ranges of the queries that ask instead of all; chunks that no
    item has for one of them, from `own_column` on, it finds in its table.
    """

    rows: Int32[Array, " A"]  # which of the call's queries; R for padding
    count: Int32[Array, ""]
    chunk: Int32[Array, " A"]  # its own, counted in its sequence: it chooses among those before
    table: Int32[Array, " A"]  # which of `tables` is its sequence's
    own_column: Int32[Array, " A"]
    tables: Int32[Array, "S P"]  # with some chunk of the pool behind a sequence's last
    items: WorkItems
    item_column: Int32[Array, " I"]  # of the item's first chunk

    @property
    def columns(self) -> int:
        """Most chunks of a sequence, P."""
        return self.tables.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ItemColumns:
    """Where in their sequences the rows of a decode batch find what items have."""

    first: Int32[Array, " I"]  # of each item, by the first chunk
    own: Int32[Array, " B"]  # of each row, the first that no item has for it
    first_row: Int32[Array, "B P"]  # of those next to each other with the same chunk there
    rows: Int32[Array, "B P"]  # how many these are

    @classmethod
    def of(cls, items: WorkItems, tables: Int32[Array, "B P"]) -> ItemColumns:
        """By the tables of all rows: a sequence has no chunk twice."""
        batch, columns = tables.shape
        row, column = (jnp.arange(size, dtype=jnp.int32)[None] for size in (batch, columns))
        first = _item_columns(items, tables, row[0])
        used = jnp.arange(len(first), dtype=jnp.int32) < items.count
        has_row = used[:, None] & (items.row_begin[:, None] <= row)
        has_row &= row < (items.row_begin + items.row_count)[:, None]
        has_column = first[:, None] <= column
        has_column &= column < (first + items.chunk_count)[:, None]
        times = jnp.einsum("ib,ip->bp", has_row.astype(jnp.int32), has_column.astype(jnp.int32))
        own = jnp.argmin(times > 0, axis=1).astype(jnp.int32)
        same = tables[1:] == tables[:-1]
        first_row = lax.cummax(jnp.where(jnp.pad(same, ((1, 0), (0, 0))), 0, row.T))
        last_row = jnp.where(jnp.pad(same, ((0, 1), (0, 0))), batch, row.T)
        last_row = lax.cummin(last_row, reverse=True)
        return cls(first, own, first_row, last_row - first_row + 1)


def asking_rows(
    asks: Bool[Array, " B"],
    chunk: Int32[Array, " B"],
    tables: Int32[Array, "B P"],
    items: WorkItems,
    columns: ItemColumns,
) -> Asking:
    """Of the rows of a decode batch, whose tokens to come lie in these chunks, those that ask."""
    batch = len(asks)
    rows = _which(asks, batch)
    return Asking(
        rows,
        asks.sum(dtype=jnp.int32),
        _of(chunk, rows),
        jnp.minimum(rows, batch - 1),
        _of(columns.own, rows),
        tables,
        _among(items, asks),
        columns.first,
    )


def asking_tokens(
    asks: Bool[Array, " T"],
    positions: Int32[Array, " T"],
    sequence: Int32[Array, " T"],
    tables: Int32[HostOrDevice, "S P"],
    own_chunk: Int32[HostOrDevice, " S"],
    items: WorkItems,
    *,
    most: int,
    chunk_size: int,
    num_chunks: int,
) -> Asking:
    """Of the packed tokens of a prefill call those that ask, at most so many."""
    tables = jnp.minimum(tables, num_chunks - 1)
    rows = _which(asks, most)
    table = _of(sequence, rows)
    return Asking(
        rows,
        asks.sum(dtype=jnp.int32),
        _of(positions // chunk_size, rows),
        table,
        jnp.asarray(own_chunk)[table],
        tables,
        _among(items, asks),
        _item_columns(items, tables, sequence),
    )


def _which(asks: Bool[Array, " R"], most: int) -> Int32[Array, " A"]:
    (rows,) = jnp.nonzero(asks, size=most, fill_value=len(asks))
    return rows.astype(jnp.int32)


def _of(values: Int32[Array, " R"], rows: Int32[Array, " A"]) -> Int32[Array, " A"]:
    return values.at[rows].get(mode="fill", fill_value=0)


def _among(items: WorkItems, asks: Bool[Array, " R"]) -> WorkItems:
    """Items of the queries that ask, counted among those."""
    items = jax.tree.map(jnp.asarray, items)
    before = jnp.cumsum(asks, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), before])
    begin = before[items.row_begin]
    count = before[items.row_begin + items.row_count] - begin
    return replace(items, row_begin=begin, row_count=count)


def _item_columns(
    items: WorkItems, tables: Int32[Array, "S P"], sequence: Int32[Array, " R"]
) -> Int32[Array, " I"]:
    """Where in its rows' sequences each item begins: a sequence has no chunk twice."""
    first = jnp.asarray(items.chunks).at[items.chunk_begin].get(mode="clip")
    table = tables[sequence[items.row_begin]]
    return jnp.argmax(table == first[:, None], axis=1).astype(jnp.int32)
