"""One dense attention for each level of the tree, and a merge between two levels.

The formulation of Hydragen (arXiv 2402.05099), of ChunkAttention's authors for one level of sharing
and of FlashInfer's multi-level cascade: the queries of all sequences below a node are one batch for
its keys, every level is a launch of its own, and so is each merge, by log-sum-exp. Levels must be
uniform: as many rows below each of their nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from experiments.baselines.dense import (
    attend_partial,
    dense_copies,
    grouped_queries,
    map_pairs,
)

MOST_SCORES = 1 << 20
"""Scores of one node and KV head that are held at once: more queries than that take turns, as in
flash attention, so that their scores stay in the caches of 2 CPU cores."""


class NotUniform(ValueError):
    """The nodes of a level have different numbers of rows below them."""


@dataclass(frozen=True)
class Level:
    """Nodes with as many rows each, in the order of the rows.

    Attributes:
      keys, values: [nodes, Hkv, T, D].
      lengths: tokens of each node, where not all have T.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array | None


def cascade_levels(
    keys: Float[Array, "L Hkv N C D"],
    values: Float[Array, "L Hkv N C D"],
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    layer: int = 0,
) -> list[Level]:
    """The tree that block tables tell of, the keys and values of each node in one piece.

    What rows have to themselves is the last level, and the only one that may be ragged.

    Raises:
      NotUniform: see there.
    """
    chunk_size = keys.shape[3]
    levels = []
    for nodes, begin, end in _columns(tables):
        rows = range(0, len(tables), len(tables) // nodes)
        chunks = [tables[row][begin:end] for row in rows]
        tokens = [min(lengths[row], end * chunk_size) - begin * chunk_size for row in rows]
        longest = max(tokens)
        if not longest:
            continue
        node_keys, node_values = (
            dense_copies(pool, chunks, layer=layer)[:, :, :longest] for pool in (keys, values)
        )
        ragged = None if min(tokens) == longest else jnp.asarray(tokens, jnp.int32)
        levels.append(Level(node_keys, node_values, ragged))
    return levels


def cascade_attention(
    q: Float[Array, "B Hq D"], levels: Sequence[Level], *, scale: float | None = None
) -> Float[Array, "B Hq D"]:
    """Softmax attention of one query per row; one launch a level and one a merge.

    Accumulates in float32.
    """
    first, *more = levels
    output, log_sum = attend_level(q, first.keys, first.values, first.lengths, scale=scale)
    for level in more:
        state = attend_level(q, level.keys, level.values, level.lengths, scale=scale)
        output, log_sum = merge_levels(output, log_sum, *state)
    return output.astype(q.dtype)


@functools.partial(jax.jit, static_argnames="scale")
def attend_level(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "nodes Hkv T D"],
    values: Float[Array, "nodes Hkv T D"],
    lengths: Int32[Array, " nodes"] | None,
    *,
    scale: float | None = None,
) -> tuple[Float32[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """Attention of all rows over their nodes of one level, and the logarithms of the sums."""
    batch, num_heads, head_dim = q.shape
    nodes, kv_heads, tokens, _ = keys.shape
    rows, group = batch // nodes, num_heads // kv_heads
    queries = grouped_queries(q, kv_heads, scale).reshape(nodes, rows, kv_heads, group, head_dim)
    queries = queries.transpose(0, 2, 1, 3, 4).reshape(nodes * kv_heads, -1, head_dim)
    blocks = _blocks(rows * group, tokens)
    queries = queries.reshape(nodes * kv_heads * blocks, -1, head_dim)
    node_keys, node_values = (x.reshape(nodes * kv_heads, tokens, -1) for x in (keys, values))

    def attend_pair(pair):
        at = lax.div(pair, blocks)
        length = None if lengths is None else jnp.maximum(lengths[lax.div(at, kv_heads)], 1)
        return attend_partial(queries[pair], node_keys[at], node_values[at], length)

    # Half of the numbers that one pair needs: it has keys, values, scores, queries and outputs.
    together = queries.shape[1]
    context = tokens * head_dim + together * (tokens // 2 + head_dim)
    partial = map_pairs(attend_pair, len(queries), context)

    def by_row(x: jax.Array, *last: int) -> jax.Array:
        x = x.reshape(nodes, kv_heads, rows, group, *last)
        return jnp.moveaxis(x, 2, 1).reshape(batch, num_heads, *last)

    total = by_row(partial.total)
    output = by_row(partial.output, head_dim) / total[..., None]
    log_sum = by_row(partial.maximum) + jnp.log(total)
    if lengths is not None:  # a row may have nothing of its own: the sum over no keys
        seen = (jnp.repeat(lengths, rows, total_repeat_length=batch) > 0)[:, None]
        output = jnp.where(seen[..., None], output, 0)
        log_sum = jnp.where(seen, log_sum, -jnp.inf)
    return output, log_sum


@jax.jit
def merge_levels(
    output: Float32[Array, "B Hq D"],
    log_sum: Float32[Array, "B Hq"],
    other_output: Float32[Array, "B Hq D"],
    other_log_sum: Float32[Array, "B Hq"],
) -> tuple[Float32[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """Attention over the keys of both levels."""
    merged = jnp.logaddexp(log_sum, other_log_sum)
    weight, other_weight = (jnp.exp(x - merged)[..., None] for x in (log_sum, other_log_sum))
    return weight * output + other_weight * other_output, merged


def _columns(tables: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(nodes, first column, end) of every level."""
    shortest, longest = min(map(len, tables)), max(map(len, tables))
    nodes: list[int] = [_nodes([table[column] for table in tables]) for column in range(shortest)]
    beyond: list[Any] = [chunk for table in tables for chunk in table[shortest:]]
    if len(set(beyond)) < len(beyond):
        raise NotUniform("rows of different lengths share their last chunks")
    nodes += [len(tables)] * (longest - shortest)
    levels, begin = [], 0
    for count, columns in groupby(nodes):
        end = begin + len(list(columns))
        levels.append((count, begin, end))
        begin = end
    return levels


def _nodes(chunks: list[int]) -> int:
    """The number of different chunks in a column, each of as many rows side by side."""
    column = np.asarray(chunks)
    nodes = 1 + int((column[1:] != column[:-1]).sum())
    if len(column) % nodes == 0:
        by_node = column.reshape(nodes, -1)
        if (by_node == by_node[:, :1]).all():
            return nodes
    raise NotUniform("the nodes of a level have different numbers of rows below them")


def _blocks(queries: int, tokens: int) -> int:
    """The fewest equal blocks of the queries with no more than `MOST_SCORES` scores each."""
    fewest = -(-queries * tokens // MOST_SCORES)
    return next(count for count in range(min(fewest, queries), queries + 1) if queries % count == 0)
