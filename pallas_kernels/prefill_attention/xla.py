"""Prefill attention in plain JAX, one KV head at a time, in two phases like decoding.

Chunk-first: chunks wholly before the new tokens of one or several sequences are read once for all
those tokens, as unmasked matrix products. Then every query tile attends to its sequence's own new
chunks; only those the tile itself lies in are masked.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunk_attention.xla import (
    attend_run,
    attend_tokens,
    chunk_first,
    gather_chunks,
    map_heads,
    merge_rows,
)
from pallas_kernels.online_softmax import Partial, merge, normalise
from pallas_kernels.plans import PrefillPlan


def prefill_attention(
    q,
    keys,
    values,
    plan: PrefillPlan,
    *,
    layer,
    scale: float,
    query_tile: int,
    softcap: float | None = None,
):
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    tokens, num_heads, head_dim = q.shape
    group = num_heads // keys.shape[1]
    tile = min(query_tile, tokens)

    def attend_head(head, queries):
        def attend_tile(index, state: Partial) -> Partial:
            begin, count = plan.tile_begin[index], plan.tile_count[index]
            first, sequence = plan.tile_position[index], plan.tile_sequence[index]
            start = jnp.minimum(begin, tokens - tile)
            row = start + jnp.arange(tile, dtype=jnp.int32)
            inside = ((row >= begin) & (row < begin + count))[:, None]
            rows = lax.dynamic_slice_in_dim(queries, start, tile)
            own = _attend_causal(
                rows.reshape(tile * group, head_dim),
                jnp.repeat(first + row - begin, group),
                keys,
                values,
                plan.block_tables[sequence],
                plan.own_chunk[sequence],
                first,
                first + count,
                layer,
                head,
                softcap,
            )
            return merge_rows(state, own, start, inside)

        before = chunk_first(queries, keys, values, plan.items, layer, head, softcap)
        return normalise(lax.fori_loop(0, plan.num_tiles, attend_tile, before))

    return map_heads(attend_head, q, keys.shape[1], scale)


def _attend_causal(
    queries,
    positions,
    keys,
    values,
    table,
    begin,
    first,
    last,
    layer,
    head,
    softcap: float | None,
) -> Partial:
    """Rows at `positions`, all in [first, last), over the tokens from chunk `begin` on."""
    chunk_size = keys.shape[3]
    full = lax.div(first, jnp.int32(chunk_size))
    before = attend_run(queries, keys, values, table, begin, full - begin, layer, head, softcap)

    def attend_diagonal(chunk, state: Partial) -> Partial:
        ids = table[chunk][None]
        k = gather_chunks(keys, layer, head, ids)
        v = gather_chunks(values, layer, head, ids)
        key_position = chunk * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        visible = key_position[:, None] <= positions[None]
        return merge(state, attend_tokens(queries, k, v, softcap, visible))

    end = lax.div(last + (chunk_size - 1), jnp.int32(chunk_size))
    return lax.fori_loop(full, end, attend_diagonal, before)
