"""Prefill attention in plain JAX: one query tile of one KV head at a time.

Chunks wholly before a tile need no mask and go through the same matrix products as the
chunk-first phase of decoding; only the chunks the tile itself lies in are masked.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunk_attention.xla import attend_run, dot, gather_chunks
from pallas_kernels.online_softmax import MASKED, Partial, merge, normalise
from pallas_kernels.plans import PrefillPlan


def prefill_attention(q, keys, values, plan: PrefillPlan, *, layer, scale: float, query_tile: int):
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    tokens, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    group = num_heads // kv_heads
    tile = min(query_tile, tokens)
    queries = (q.astype(jnp.float32) * scale).reshape(tokens, kv_heads, group, head_dim)
    queries = queries.transpose(1, 0, 2, 3)

    def attend_head(head):
        def attend_tile(index, output):
            begin, count = plan.tile_begin[index], plan.tile_count[index]
            start = jnp.minimum(begin, tokens - tile)
            row = start + jnp.arange(tile, dtype=jnp.int32)
            inside = ((row >= begin) & (row < begin + count))[:, None, None]
            position = plan.tile_position[index] + row - begin
            rows = lax.dynamic_slice_in_dim(queries[head], start, tile)
            rows = rows.reshape(tile * group, head_dim)
            table = plan.block_tables[plan.tile_sequence[index]]
            first, last = plan.tile_position[index], plan.tile_position[index] + count
            result = _attend_causal(
                rows, jnp.repeat(position, group), keys, values, table, first, last, layer, head
            )
            result = normalise(result).reshape(tile, group, head_dim)
            old = lax.dynamic_slice_in_dim(output, start, tile)
            new = jnp.where(inside, result, old)
            return lax.dynamic_update_slice_in_dim(output, new, start, 0)

        empty = jnp.zeros((tokens, group, head_dim), jnp.float32)
        return lax.fori_loop(0, plan.num_tiles, attend_tile, empty)

    output = lax.map(attend_head, jnp.arange(kv_heads))
    return output.transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype)


def _attend_causal(queries, positions, keys, values, table, first, last, layer, head) -> Partial:
    """Rows at `positions`, all in [first, last), over the tokens up to each row's own."""
    chunk_size = keys.shape[3]
    full = lax.div(first, jnp.int32(chunk_size))
    before = attend_run(queries, keys, values, table, jnp.int32(0), full, layer, head)

    def attend_diagonal(chunk, state: Partial) -> Partial:
        ids = table[chunk][None]
        k = gather_chunks(keys, layer, head, ids)
        v = gather_chunks(values, layer, head, ids)
        key_position = chunk * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        visible = key_position[:, None] <= positions[None]
        scores = jnp.where(visible, dot(k, queries, ((1,), (1,))), MASKED)
        maximum = scores.max(axis=0)
        weights = jnp.where(visible, jnp.exp(scores - maximum[None]), 0)
        partial = Partial(dot(weights, v, ((0,), (0,))), maximum, weights.sum(axis=0))
        return merge(state, partial)

    end = lax.div(last + (chunk_size - 1), jnp.int32(chunk_size))
    return lax.fori_loop(full, end, attend_diagonal, before)
