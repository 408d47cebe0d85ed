"""Attention to chunks that rows have chosen, in plain JAX, laid out for CPUs.

Where each of many rows reads another part of a run of chunks, most of a matrix product of all rows
with all chunks is thrown away. Here a chunk meets the rows that have chosen it, a few at a time: a
tile. Many tiles are one batched product in which nothing is masked, and what they found is brought
to their rows by another product, with ones where a tile has a row.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import HeadKV
from pallas_kernels.online_softmax import MASKED, Partial, empty
from pallas_kernels.plans import ChosenTiles

PIECE_TOKENS = (2048, 512)
"""Tokens of the tiles of one step; each size is another copy of the program. Larger steps cost less
a tile: of 152 tiles of 64 tokens, steps of 4, 16 and 32 tiles took 12.6, 10.0 and 8.7 ms."""


def attend_tiles(
    queries: Float32[Array, "B G D"], kv: HeadKV, tiles: ChosenTiles, attention: AttentionSpec
) -> Partial:
    """All tiles, merged into the rows they have: Partial [B, G]."""
    batch, group, head_dim = queries.shape
    number, rows = tiles.rows.shape
    state, begin = empty((batch, group), head_dim), jnp.int32(0)
    sizes = sorted({min(number, max(1, tokens // kv.stored.chunk_size)) for tokens in PIECE_TOKENS})
    for size in reversed(sizes):
        left = tiles.count - begin
        # The last ones are as many as fit, of which some are over or have been before.
        pieces = lax.div(left if size > sizes[0] else left + (size - 1), jnp.int32(size))

        def attend_piece(piece, state, size=size, begin=begin):
            first = begin + piece * size
            place = jnp.minimum(first, number - size)
            chunks = lax.dynamic_slice_in_dim(jnp.asarray(tiles.chunks), place, size)
            of_tile = lax.dynamic_slice_in_dim(jnp.asarray(tiles.rows), place, size)
            index = place + jnp.arange(size, dtype=jnp.int32)
            due = ((index >= first) & (index < tiles.count))[:, None]
            of_tile = jnp.where(due, of_tile, batch)
            some = queries.at[of_tile].get(mode="clip").reshape(size, rows * group, head_dim)
            new = _attend(some, kv, jnp.minimum(chunks, kv.stored.num_chunks - 1), attention)
            new = Partial(*(one.reshape(size * rows, group, *one.shape[2:]) for one in new))
            return _merge_into_rows(state, new, of_tile.ravel())

        state = lax.fori_loop(0, pieces, attend_piece, state)
        begin = begin + pieces * size
    return state


def _attend(
    queries: Float32[Array, "T R D"],
    kv: HeadKV,
    chunks: Int32[Array, " T"],
    attention: AttentionSpec,
) -> Partial:
    """Attention of each tile's queries to its chunk: Partial [T, R]."""
    k, v = kv.gather(chunks[:, None])  # [T, C, D]
    scores = jnp.einsum("trd,tcd->trc", queries, k, precision=lax.Precision.HIGHEST)
    scores = attention.cap(scores)
    maximum = scores.max(axis=-1)
    weights = jnp.exp(scores - maximum[..., None])
    output = jnp.einsum("trc,tcd->trd", weights, v, precision=lax.Precision.HIGHEST)
    return Partial(output, maximum, weights.sum(axis=-1))


def _merge_into_rows(state: Partial, new: Partial, rows: Int32[Array, " S"]) -> Partial:
    """With the results `new` [S, G] merged into these rows of the state [B, G]; row B drops one.

    A result that is not finite stays with its row: in a product it would be everybody's.
    """
    batch, group = state.total.shape
    head_dim = state.output.shape[2]
    member = rows[None] == jnp.arange(batch, dtype=jnp.int32)[:, None]  # [B, S]
    finite = jnp.isfinite(new.output).all(axis=2) & jnp.isfinite(new.total)
    maximum = jnp.where(finite, new.maximum, MASKED)
    largest = jnp.where(member[:, :, None], maximum[None], MASKED).max(axis=1)
    largest = jnp.maximum(state.maximum, largest)
    weights = jnp.exp(maximum - largest.at[rows].get(mode="clip"))
    weights = jnp.where((rows < batch)[:, None] & finite, weights, 0)
    output = jnp.where(weights[..., None] > 0, new.output * weights[..., None], 0)
    total = jnp.where(weights > 0, new.total * weights, 0)
    both = jnp.concatenate([output.reshape(len(rows), -1), total], axis=1)
    both = jnp.dot(member.astype(jnp.float32), both, precision=lax.Precision.HIGHEST)
    spoiled = (member[:, :, None] & ~finite[None]).any(axis=1)
    old = jnp.exp(state.maximum - largest)
    output = both[:, : group * head_dim].reshape(batch, group, head_dim)
    return Partial(
        jnp.where(spoiled[..., None], jnp.nan, state.output * old[..., None] + output),
        largest,
        state.total * old + both[:, group * head_dim :],
    )
