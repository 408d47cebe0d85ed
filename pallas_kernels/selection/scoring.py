"""How well the chunks before a query score, over all heads of a layer.

A layer's heads read the same chunks, so their scores are made one: for each query head the softmax
of what each chunk scores, over the chunks, and the sum of these over the heads. A head that looks
for one thing counts as much as one that looks at everything.

As attention does it, chunks that several queries have in common are read once for all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.online_softmax import MASKED
from pallas_kernels.selection.asking import Asking
from pallas_kernels.selection.estimates import CompiledEstimate, Estimate

QUARTER = 4  # a tile has a quarter of the queries, or all: few ask at a step of many rows
PIECES = (16, 1)  # chunks of an item in one step; each size is another copy of the program
OWN_ROWS = 8  # queries that look at chunks of their own in one step
OWN_COLUMNS = 4  # chunks of each of them


def chunk_scores(
    q: Float[Array, "R Hq D"],
    asking: Asking,
    estimate: Estimate | CompiledEstimate,
    attention: AttentionSpec,
) -> Float32[Array, "A P"]:
    """The scores of the chunks before each query that asks, from 0 to the number of query heads;
    0 of others."""
    those = q.at[asking.rows].get(mode="clip").astype(jnp.float32)
    if isinstance(estimate, CompiledEstimate):
        return estimate.shares(those, asking, attention).sum(axis=1)
    queries = attention.heads.split(those)
    queries = queries.transpose(1, 0, 2, 3) * attention.scale  # [Hkv, A, G, D]
    column = jnp.arange(asking.columns, dtype=jnp.int32)[:, None]
    before = (column < asking.chunk[None])[:, :, None]

    def add_head(head, total):
        of_head = queries[head]
        best = _of_items(of_head, head, asking, estimate)
        best = _of_own(of_head, head, asking, estimate, best)
        best = jnp.where(before, attention.cap(best), MASKED)
        return total + jnp.where(before, jax.nn.softmax(best, axis=0), 0).sum(axis=2)

    # Columns first: a CPU computes along the last axis several at once.
    total = jnp.zeros((asking.columns, len(asking.rows)), jnp.float32)
    return lax.fori_loop(0, len(queries), add_head, total).T


def _of_items(
    queries: Float32[Array, "A G D"],
    head: Int32[Array, ""],
    asking: Asking,
    estimate: Estimate,
) -> Float32[Array, "P A G"]:
    """Best scores of the chunks that items have; of no others."""
    number, group, head_dim = queries.shape
    items, tiles = asking.items, sorted({-(-number // QUARTER), number})

    def look_at_item(tile, item, best):
        first, rows = items.row_begin[item], items.row_count[item]
        start = jnp.minimum(first, number - tile)
        some = lax.dynamic_slice_in_dim(queries, start, tile).reshape(tile * group, head_dim)
        row = start + jnp.arange(tile, dtype=jnp.int32)
        inside = ((row >= first) & (row < first + rows))[None, :, None]
        begin, column = items.chunk_begin[item], asking.item_column[item]
        count = jnp.where(rows > 0, items.chunk_count[item], 0)
        for size in PIECES:
            if size > min(items.chunks.shape[0], asking.columns):
                continue
            pieces = lax.div(count, jnp.int32(size))

            def look_at_piece(piece, best, size=size, begin=begin, column=column):
                ids = lax.dynamic_slice(jnp.asarray(items.chunks), (begin + piece * size,), (size,))
                new = estimate.best(head, ids, some).reshape(size, tile, group)
                place = column + piece * size, start, 0
                old = lax.dynamic_slice(best, place, (size, tile, group))
                new = jnp.where(inside, new, old)
                return lax.dynamic_update_slice(best, new, place)

            best = lax.fori_loop(0, pieces, look_at_piece, best)
            read = pieces * size
            begin, column, count = begin + read, column + read, count - read
        return best

    def step(item, best):
        larger = items.row_count[item] > jnp.asarray(tiles, jnp.int32)
        branches = [lambda item, best, tile=tile: look_at_item(tile, item, best) for tile in tiles]
        return lax.switch(larger.sum(dtype=jnp.int32), branches, item, best)

    empty = jnp.full((asking.columns, number, group), MASKED, jnp.float32)
    return lax.fori_loop(0, items.count, step, empty)


def _of_own(
    queries: Float32[Array, "A G D"],
    head: Int32[Array, ""],
    asking: Asking,
    estimate: Estimate,
    best: Float32[Array, "P A G"],
) -> Float32[Array, "P A G"]:
    """With the best scores of the chunks that no item has."""
    number = len(queries)
    some = min(OWN_ROWS, number)

    def look_at_rows(index, best):
        start = jnp.minimum(index * some, number - some)
        row = start + jnp.arange(some, dtype=jnp.int32)
        begin, end = asking.own_column[row], asking.chunk[row]
        left = jnp.where(row < asking.count, end - begin, 0)

        def look_at_columns(step, best):
            column = begin[:, None] + step * OWN_COLUMNS
            column = column + jnp.arange(OWN_COLUMNS, dtype=jnp.int32)[None]
            table = asking.table[row][:, None]
            ids = asking.tables.at[table, column].get(mode="clip")
            new = estimate.best(head, ids, queries[row])
            column = jnp.where(column < end[:, None], column, asking.columns)
            return best.at[column, row[:, None]].set(new, mode="drop")

        steps = lax.div(jnp.max(left) + (OWN_COLUMNS - 1), jnp.int32(OWN_COLUMNS))
        return lax.fori_loop(0, steps, look_at_columns, best)

    steps = lax.div(asking.count + (some - 1), jnp.int32(some))
    return lax.fori_loop(0, steps, look_at_rows, best)
