"""Prefill attention in plain JAX, one KV head at a time, in two phases like decoding.

Chunk-first: chunks wholly before the new tokens of one or several sequences are read once for all
those tokens, as unmasked matrix products. Then every query tile attends to its sequence's own new
chunks; only those the tile itself lies in are masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.xla import (
    Run,
    attend_run,
    attend_tokens,
    chunk_first,
    map_heads,
    merge_rows,
)
from pallas_kernels.coded_kv import HeadKV, LayerKV
from pallas_kernels.online_softmax import Partial, merge, normalise
from pallas_kernels.plans import HostOrDevice, NewTokens, PrefillReads


@dataclass(frozen=True)
class OwnTokens:
    """What a query tile reads of its sequence: the tokens from chunk `chunk_begin` on.

    The tile's own tokens are at positions [first, last), packed from `packed` on.
    """

    table: Int32[HostOrDevice, " P"]
    chunk_begin: Int32[HostOrDevice, ""]
    first: Int32[HostOrDevice, ""]
    last: Int32[HostOrDevice, ""]
    packed: Int32[HostOrDevice, ""]


def prefill_attention(
    q: Float[Array, "T Hq D"], stored: LayerKV, reads: PrefillReads, attention: AttentionSpec
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    tokens, _, head_dim = q.shape
    plan, group = reads.plan, attention.heads.group
    tile = min(reads.query_tile, tokens)

    def attend_head(kv: HeadKV, queries: Float32[Array, "T G D"]) -> Float32[Array, "T G D"]:
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
                kv,
                OwnTokens(
                    plan.block_tables[sequence],
                    plan.own_chunk[sequence],
                    first,
                    first + count,
                    begin,
                ),
                reads.new,
                attention,
            )
            return merge_rows(state, own, start, inside)

        before = chunk_first(queries, kv, plan.items, attention)
        return normalise(lax.fori_loop(0, plan.num_tiles, attend_tile, before))

    return map_heads(attend_head, q, stored, attention)


def _attend_causal(
    queries: Float32[Array, "R D"],
    positions: Int32[Array, " R"],
    kv: HeadKV,
    own: OwnTokens,
    new: NewTokens | None,
    attention: AttentionSpec,
) -> Partial:
    """Query rows at `positions` over their own tokens, each up to itself: Partial [R].

    With `new`, each reads the tokens of its own chunk there.
    """
    chunk_size = kv.stored.chunk_size
    full = lax.div(own.first, jnp.int32(chunk_size))
    run = Run(own.table, own.chunk_begin, full - own.chunk_begin)
    before = attend_run(queries, kv, run, attention)

    def attend_diagonal(chunk, state: Partial) -> Partial:
        k, v = kv.gather(own.table[chunk][None])
        key_position = chunk * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        visible = key_position[:, None] <= positions[None]
        return merge(state, attend_tokens(queries, k, v, attention, visible))

    def attend_encoded(chunk, state: Partial) -> Partial:
        k, v = kv.gather(own.table[chunk][None])
        behind = (positions // chunk_size > chunk)[None]
        behind = jnp.broadcast_to(behind, (chunk_size, len(positions)))
        return merge(state, attend_tokens(queries, k, v, attention, behind))

    def attend_exact(chunk, state: Partial) -> Partial:
        assert new is not None
        size = min(chunk_size, len(new.keys))
        begin = own.packed + chunk * chunk_size - own.first
        start = jnp.minimum(begin, len(new.keys) - size)
        k, v = (
            lax.dynamic_slice_in_dim(tokens, start, size)[:, kv.head].astype(jnp.float32)
            for tokens in (new.keys, new.values)
        )
        key_position = chunk * chunk_size + start - begin + jnp.arange(size, dtype=jnp.int32)
        inside = (key_position >= chunk * chunk_size)[:, None]
        inside &= (positions // chunk_size == chunk)[None]
        visible = inside & (key_position[:, None] <= positions[None])
        return merge(state, attend_tokens(queries, k, v, attention, visible))

    end = lax.div(own.last + (chunk_size - 1), jnp.int32(chunk_size))
    if new is None:
        return lax.fori_loop(full, end, attend_diagonal, before)
    before = lax.fori_loop(full, end - 1, attend_encoded, before)
    return lax.fori_loop(full, end, attend_exact, before)
