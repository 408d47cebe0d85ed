"""Prefill attention in plain JAX, one KV head at a time, in two phases like decoding.

Chunk-first: chunks wholly before the new tokens of one or several sequences are read once for all
those tokens, as unmasked matrix products. Then every query tile attends to its sequence's own new
chunks; only those the tile itself lies in are masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.xla import map_heads
from pallas_kernels.chunk_attention.xla_items import (
    Run,
    attend_run,
    attend_tokens,
    chunk_first,
    merge_rows,
)
from pallas_kernels.coded_kv import HeadKV, LayerKV
from pallas_kernels.online_softmax import Partial, empty, merge, normalise
from pallas_kernels.plans import HiddenTokens, HostOrDevice, NewTokens, PrefillReads


@dataclass(frozen=True)
class OwnTokens:
    """What a query tile reads of its sequence: the tokens from chunk `chunk_begin` on.

    The tile's own tokens are at positions [first, last), packed from `packed` on. Of those before
    them, `window` says what is hidden.
    """

    table: Int32[HostOrDevice, " P"]
    chunk_begin: Int32[HostOrDevice, ""]
    first: Int32[HostOrDevice, ""]
    last: Int32[HostOrDevice, ""]
    packed: Int32[HostOrDevice, ""]
    window: TileWindow | None


@dataclass(frozen=True)
class TileWindow:
    """`HiddenTokens` of one sequence and head; places count from the first token of `OwnTokens`."""

    size: Int32[Array, ""]
    sinks: Int32[Array, ""]
    begin: Int32[Array, ""]
    offset: Int32[Array, ""]

    def sees(self, place: Int32[Array, " T"], positions: Int32[Array, " R"]) -> Bool[Array, "T R"]:
        """Whether queries at these positions see the tokens at these places, as far as it goes."""
        opens = positions + 1 - self.size - self.offset
        return (place[:, None] < self.begin) | (place[:, None] >= opens[None])

    def sees_position(
        self, position: Int32[Array, " T"], positions: Int32[Array, " R"]
    ) -> Bool[Array, "T R"]:
        """The same of tokens at these positions."""
        opens = positions + 1 - self.size
        return (position[:, None] < self.sinks) | (position[:, None] >= opens[None])

    def first_chunk(self, first: Int32[HostOrDevice, ""], chunk_size: int) -> Int32[Array, ""]:
        """The first chunk of which queries from position `first` on see a token."""
        opens = jnp.maximum(first + 1 - self.size - self.offset, 0)
        return jnp.where(self.begin > 0, 0, lax.div(opens, jnp.int32(chunk_size)))


def prefill_attention(
    q: Float[Array, "T Hq D"], stored: LayerKV, reads: PrefillReads, attention: AttentionSpec
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    tokens, _, head_dim = q.shape
    group, tile = attention.heads.group, min(reads.query_tile, tokens)

    def attend_head(kv: HeadKV, queries: Float32[Array, "T G D"]) -> Float32[Array, "T G D"]:
        plan = reads.by_head(kv.head).plan

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
                    _window_of(plan.hidden, sequence),
                ),
                reads.new,
                attention,
            )
            return merge_rows(state, own, start, inside)

        before = chunk_first(queries, kv, plan.items, attention)
        return normalise(lax.fori_loop(0, plan.num_tiles, attend_tile, before))

    return map_heads(attend_head, q, stored, attention)


def _window_of(hidden: HiddenTokens | None, sequence: Int32[HostOrDevice, ""]) -> TileWindow | None:
    if hidden is None:
        return None
    sizes = hidden.size, hidden.sinks, hidden.begin[sequence], hidden.offset[sequence]
    return TileWindow(*map(jnp.asarray, sizes))


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
    chunk_size, window = kv.stored.chunk_size, own.window
    full = lax.div(own.first, jnp.int32(chunk_size))

    def unhidden(
        visible: Bool[Array, "T R"], key_position: Int32[Array, " T"]
    ) -> Bool[Array, "T R"]:
        """`visible` less what the window hides; positions are those of the table's tokens."""
        if window is None:
            return visible
        return visible & window.sees(key_position - own.chunk_begin * chunk_size, positions)

    def attend_diagonal(chunk, state: Partial) -> Partial:
        k, v = kv.gather(own.table[chunk][None])
        key_position = chunk * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        visible = unhidden(key_position[:, None] <= positions[None], key_position)
        return merge(state, attend_tokens(queries, k, v, attention, visible))

    def attend_encoded(chunk, state: Partial) -> Partial:
        k, v = kv.gather(own.table[chunk][None])
        behind = (positions // chunk_size > chunk)[None]
        behind = jnp.broadcast_to(behind, (chunk_size, len(positions)))
        key_position = chunk * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        behind = unhidden(behind, key_position)
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
        if window is not None:
            visible &= window.sees_position(key_position, positions)
        return merge(state, attend_tokens(queries, k, v, attention, visible))

    if window is None:
        begin, run = full, Run(own.table, own.chunk_begin, full - own.chunk_begin)
        before = attend_run(queries, kv, run, attention)
    else:
        begin = own.chunk_begin + window.first_chunk(own.first, chunk_size)
        before = empty(queries.shape[:1], queries.shape[1])
    end = lax.div(own.last + (chunk_size - 1), jnp.int32(chunk_size))
    if new is None:
        return lax.fori_loop(begin, end, attend_diagonal, before)
    before = lax.fori_loop(begin, end - 1, attend_encoded, before)
    return lax.fori_loop(full, end, attend_exact, before)
