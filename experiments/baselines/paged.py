"""Paged attention (vLLM; Kwon et al., SOSP 2023): block tables, and every row reads its own.

With a pool that holds a copy of each chunk for each row, it is a server without a prefix cache.
With tables that name the shared chunks, it is one with a prefix cache: memory is saved, but a
shared chunk is still read once for every row (PagedAttn* in ChunkAttention's Table 3).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from experiments.baselines.dense import attend, grouped_queries, map_pairs


@functools.partial(jax.jit, static_argnames="scale")
def paged_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "L Hkv N C D"],
    values: Float[Array, "L Hkv N C D"],
    tables: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    *,
    layer: int | Int32[Array, ""] = 0,
    scale: float | None = None,
) -> Float[Array, "B Hq D"]:
    """Softmax attention of one query per row over its first `lengths[b]` tokens, at least one.

    Gathers the chunks of a few pairs of a row and a KV head at a time, so that they are attended
    to from the cache. Of the orders tried on 2 CPU cores (everything at once, whole heads, all rows
    by columns, pieces of rows) none was faster. Accumulates in float32.
    """
    batch, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    queries = grouped_queries(q, kv_heads, scale)

    def attend_pair(pair):
        head, row = lax.div(pair, batch), lax.rem(pair, batch)

        def gather(pool):
            chunks = pool.at[layer, head, tables[row]].get(mode="promise_in_bounds")
            return chunks.reshape(-1, head_dim)

        return attend(queries[row, head], gather(keys), gather(values), lengths[row])

    context = tables.shape[1] * keys.shape[3] * head_dim
    output = map_pairs(attend_pair, batch * kv_heads, context)
    output = output.reshape(kv_heads, batch, num_heads // kv_heads, head_dim)
    return output.transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype)


def pool_of_copies(
    keys: Float[Array, "L Hkv N C D"],
    values: Float[Array, "L Hkv N C D"],
    tables: Sequence[Sequence[int]],
    *,
    seed: int = 0,
) -> tuple[Float[Array, "L Hkv M C D"], Float[Array, "L Hkv M C D"], list[list[int]]]:
    """A pool in which no two rows share a chunk, and the rows' tables into it.

    The chunks lie in random order, as in a pool that has been in use for a while.
    """
    source = np.concatenate([np.asarray(table, np.int32) for table in tables])
    place = np.random.default_rng(seed).permutation(len(source))
    ends = np.cumsum([len(table) for table in tables])
    copied = [chunks.tolist() for chunks in np.split(place, ends[:-1])]
    order = np.empty_like(source)
    order[place] = source
    return _take(keys, order), _take(values, order), copied


@jax.jit
def _take(pool, chunks):
    return pool.at[:, :, chunks].get(mode="promise_in_bounds")
