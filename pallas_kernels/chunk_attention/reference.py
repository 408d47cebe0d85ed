"""The definition of chunk attention, written to be read: dense over the whole pool."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.plans import ChosenTiles, DecodeReads, WorkItems


def chunk_attention(
    q: Float[Array, "B Hq D"], stored: LayerKV, reads: DecodeReads, attention: AttentionSpec
) -> Float[Array, "B Hq D"]:
    """See `pallas_kernels.chunk_attention.api.chunk_attention`.

    Computes in float64 when q is float64 (with jax_enable_x64), in float32 otherwise. Scores every
    query against every slot of the pool, so it is for small pools only.
    """
    compute = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    grouped = attention.heads.split(q.astype(compute))
    of_heads = [reads.by_head(jnp.int32(head)) for head in range(stored.kv_heads)]
    sizes = stored.num_chunks, stored.chunk_size
    mask = jnp.stack([times_read(of_head, *sizes) > 0 for of_head in of_heads], axis=1)
    highest = jax.lax.Precision.HIGHEST
    k, v = stored.all_keys().astype(compute), stored.all_values().astype(compute)
    scores = jnp.einsum("bhgd,hncd->bhgnc", grouped, k, precision=highest) * attention.scale
    scores = attention.cap(scores)
    scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
    maximum = scores.max(axis=(-2, -1), keepdims=True)
    own_scores, own_values = _own_chunks(grouped, stored, of_heads, attention)
    maximum = jnp.maximum(maximum, own_scores.max(axis=-1, initial=-jnp.inf)[..., None, None])
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0)
    weights, own_weights = jnp.exp(scores - maximum), jnp.exp(own_scores - maximum[..., 0])
    total = weights.sum(axis=(-2, -1)) + own_weights.sum(axis=-1)
    output = jnp.einsum("bhgnc,hncd->bhgd", weights, v, precision=highest)
    output += jnp.einsum("bhgc,bhcd->bhgd", own_weights, own_values, precision=highest)
    output = output / jnp.where(total > 0, total, 1)[..., None]
    return attention.heads.join(output).astype(q.dtype)


def _own_chunks(
    grouped: Float[Array, "B Hkv G D"],
    stored: LayerKV,
    of_heads: Sequence[DecodeReads],
    attention: AttentionSpec,
) -> tuple[Float[Array, "B Hkv G own"], Float[Array, "B Hkv own D"]]:
    """Scores and values of the tokens that each row reads exactly; none where the pool has all."""
    own, compute = of_heads[0].own, grouped.dtype
    if own is None:
        empty = jnp.zeros((*grouped.shape[:2], 0, grouped.shape[3]), compute)
        return jnp.zeros((*grouped.shape[:3], 0), compute), empty
    keys, values = (
        chunks.at[stored.layer, :, own.slots].get(mode="clip").astype(compute)
        for chunks in (own.keys, own.values)
    )
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bhgd,bhcd->bhgc", grouped, keys, precision=highest) * attention.scale
    visible = jnp.stack([reads.sees_own(stored.chunk_size) for reads in of_heads], axis=1)
    return jnp.where(visible[:, :, None], attention.cap(scores), -jnp.inf), values


def times_read(reads: DecodeReads, num_chunks: int, chunk_size: int) -> Int32[Array, "B N C"]:
    """How often each row attends to each token of the pool, by the plan of one head: 1 or 0."""
    plan = reads.plan
    batch, width = plan.private_chunks.shape
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    times = times_in_items(plan.items, batch, num_chunks)
    if plan.tiles is not None:
        times += times_in_tiles(plan.tiles, batch, num_chunks)
    times = jnp.broadcast_to(times[..., None], (batch, num_chunks, chunk_size))
    place = jnp.arange(width * chunk_size, dtype=jnp.int32)
    private = reads.sees(place, reads.pool_lengths(chunk_size) - plan.covered_tokens)
    private = private.reshape(batch, width, chunk_size).astype(jnp.int32)
    return times.at[rows, plan.private_chunks].add(private, mode="drop")


def times_in_items(items: WorkItems, rows: int, num_chunks: int) -> Int32[Array, "B N"]:
    """How often each row attends to each chunk of the pool by work items."""
    row = jnp.arange(rows, dtype=jnp.int32)[None]
    slot = jnp.arange(items.chunks.shape[0], dtype=jnp.int32)[None]
    begin, count = items.chunk_begin[:, None], items.chunk_count[:, None]
    first, size = items.row_begin[:, None], items.row_count[:, None]
    used = jnp.arange(begin.shape[0], dtype=jnp.int32)[:, None] < items.count
    in_item = (slot >= begin) & (slot < begin + count) & used  # [I, K]
    covers_row = (first <= row) & (row < first + size)  # [I, B]
    by_slot = jnp.einsum("ik,ib->bk", in_item.astype(jnp.int32), covers_row.astype(jnp.int32))
    if items.chosen is not None:
        by_slot = jnp.where(items.chosen.by_row[:, items.chosen.columns], by_slot, 0)
    times = jnp.zeros((rows, num_chunks), jnp.int32)
    return times.at[row.T, items.chunks[None]].add(by_slot, mode="drop")


def times_in_tiles(tiles: ChosenTiles, rows: int, num_chunks: int) -> Int32[Array, "B N"]:
    """How often each row attends to each chunk of the pool by tiles."""
    used = jnp.arange(len(tiles.chunks), dtype=jnp.int32)[:, None] < tiles.count
    chunks = jnp.broadcast_to(tiles.chunks[:, None], tiles.rows.shape)
    times = jnp.zeros((rows, num_chunks), jnp.int32)
    once = jnp.broadcast_to(used, chunks.shape).astype(jnp.int32)
    return times.at[tiles.rows, chunks].add(once, mode="drop")
