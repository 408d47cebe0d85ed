"""The definition of chunk attention, written to be read: dense over the whole pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.plans import DecodeReads


def chunk_attention(
    q: Float[Array, "B Hq D"], stored: LayerKV, reads: DecodeReads, attention: AttentionSpec
) -> Float[Array, "B Hq D"]:
    """See `pallas_kernels.chunk_attention.api.chunk_attention`.

    Computes in float64 when q is float64 (with jax_enable_x64), in float32 otherwise. Scores every
    query against every slot of the pool, so it is for small pools only.
    """
    compute = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    grouped = attention.heads.split(q.astype(compute))
    visible = tokens_per_chunk(reads, stored.num_chunks, stored.chunk_size)
    slot = jnp.arange(stored.chunk_size, dtype=jnp.int32)
    mask = slot[None, None] < visible[:, :, None]  # [B, N, C]
    highest = jax.lax.Precision.HIGHEST
    k, v = stored.all_keys().astype(compute), stored.all_values().astype(compute)
    scores = jnp.einsum("bhgd,hncd->bhgnc", grouped, k, precision=highest) * attention.scale
    scores = attention.cap(scores)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    maximum = scores.max(axis=(-2, -1), keepdims=True)
    own_scores, own_values = _own_chunks(grouped, stored, reads, attention)
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
    reads: DecodeReads,
    attention: AttentionSpec,
) -> tuple[Float[Array, "B Hkv G own"], Float[Array, "B Hkv own D"]]:
    """Scores and values of the tokens that each row reads exactly; none where the pool has all."""
    own, compute = reads.own, grouped.dtype
    if own is None:
        empty = jnp.zeros((*grouped.shape[:2], 0, grouped.shape[3]), compute)
        return jnp.zeros((*grouped.shape[:3], 0), compute), empty
    keys, values = (
        chunks.at[stored.layer, :, own.slots].get(mode="clip").astype(compute)
        for chunks in (own.keys, own.values)
    )
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bhgd,bhcd->bhgc", grouped, keys, precision=highest) * attention.scale
    count = reads.lengths - reads.pool_lengths(stored.chunk_size)
    visible = jnp.arange(stored.chunk_size, dtype=jnp.int32)[None] < count[:, None]
    return jnp.where(visible[:, None, None], attention.cap(scores), -jnp.inf), values


def tokens_per_chunk(reads: DecodeReads, num_chunks: int, chunk_size: int) -> Int32[Array, "B N"]:
    """How many tokens of each chunk of the pool every row attends to."""
    plan = reads.plan
    batch, width = plan.private_chunks.shape
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    items = plan.items
    slot = jnp.arange(items.chunks.shape[0], dtype=jnp.int32)[None]
    begin, count = items.chunk_begin[:, None], items.chunk_count[:, None]
    first, size = items.row_begin[:, None], items.row_count[:, None]
    used = jnp.arange(begin.shape[0], dtype=jnp.int32)[:, None] < items.count
    in_item = (slot >= begin) & (slot < begin + count) & used  # [I, K]
    covers_row = (first <= rows.T) & (rows.T < first + size)  # [I, B]
    by_slot = jnp.einsum("ik,ib->bk", in_item.astype(jnp.int32), covers_row.astype(jnp.int32))
    tokens = jnp.zeros((batch, num_chunks), jnp.int32)
    tokens = tokens.at[rows, items.chunks[None]].add(by_slot * chunk_size, mode="drop")

    start = jnp.arange(width, dtype=jnp.int32)[None] * chunk_size
    remaining = reads.pool_lengths(chunk_size) - plan.covered_tokens
    private = jnp.clip(remaining[:, None] - start, 0, chunk_size)
    return tokens.at[rows, plan.private_chunks].add(private, mode="drop")
