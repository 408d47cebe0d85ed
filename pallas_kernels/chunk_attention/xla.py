"""Two-phase attention in plain JAX, laid out for CPUs: one KV head at a time, so that the chunks
gathered for a head stay in cache, and each run of chunks multiplied as one matrix product.

Chunk-first: every work item gathers its chunks once and multiplies them with the queries of all
its rows (`xla_items`). Sequence-first: all rows at once, over their private chunks, masked by
length. Both loops run as often as the plan needs, not as its padding allows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.xla_clusters import chunk_first_by_cluster
from pallas_kernels.chunk_attention.xla_items import chunk_first
from pallas_kernels.chunk_attention.xla_tiles import attend_tiles
from pallas_kernels.clusters import ClusteredKV
from pallas_kernels.coded_kv import HeadKV, LayerKV
from pallas_kernels.online_softmax import MASKED, Partial, empty, merge, normalise
from pallas_kernels.plans import DecodeReads

# Chunks of all rows gathered by one step of the sequence-first loop.
SEQUENCE_STEP_CHUNKS = 32


def chunk_attention(
    q: Float[Array, "B Hq D"], stored: LayerKV, reads: DecodeReads, attention: AttentionSpec
) -> Float[Array, "B Hq D"]:
    """See `pallas_kernels.chunk_attention.api.chunk_attention`."""

    of_clusters = None
    if isinstance(stored, ClusteredKV):
        scaled = q.astype(jnp.float32) * attention.scale
        items = reads.by_head(jnp.int32(0)).plan.items  # all heads of a layer have one window
        of_clusters = chunk_first_by_cluster(scaled, stored, items, attention)

    def attend_head(kv: HeadKV, queries: Float32[Array, "B G D"]) -> Float32[Array, "B G D"]:
        of_head = reads.by_head(kv.head)
        if of_clusters is None:
            shared = chunk_first(queries, kv, of_head.plan.items, attention)
        else:
            shared = Partial(*(x[:, kv.head][:, None] for x in of_clusters))
        private = _sequence_first(queries, kv, of_head, attention)
        state = merge(shared, private)
        if of_head.plan.tiles is not None:
            state = merge(state, attend_tiles(queries, kv, of_head.plan.tiles, attention))
        return normalise(state)

    return map_heads(attend_head, q, stored, attention)


def map_heads(
    attend_head: Callable[[HeadKV, Float32[Array, "B G D"]], Float32[Array, "B G D"]],
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    attention: AttentionSpec,
) -> Float[Array, "B Hq D"]:
    """The output of every KV head, one after another; the queries are scaled and in float32."""
    queries = attention.heads.split(q.astype(jnp.float32) * attention.scale)
    queries = queries.transpose(1, 0, 2, 3)
    heads = jnp.arange(stored.kv_heads, dtype=jnp.int32)
    output = lax.map(lambda head: attend_head(HeadKV(stored, head), queries[head]), heads)
    return attention.heads.join(output.transpose(1, 0, 2, 3)).astype(q.dtype)


def _sequence_first(
    queries: Float32[Array, "B G D"], kv: HeadKV, reads: DecodeReads, attention: AttentionSpec
) -> Partial:
    """The private chunks of every row, its own among them wherever it is: Partial [B, G]."""
    batch, group, head_dim = queries.shape
    plan, num_chunks, chunk_size = reads.plan, kv.stored.num_chunks, kv.stored.chunk_size
    width = plan.private_chunks.shape[1]
    step_chunks = min(width, max(1, SEQUENCE_STEP_CHUNKS // batch))
    step_tokens = step_chunks * chunk_size
    padding = ((0, 0), (0, -width % step_chunks))
    private = jnp.pad(jnp.minimum(plan.private_chunks, num_chunks - 1), padding)
    remaining = reads.pool_lengths(chunk_size) - plan.covered_tokens

    def step(index, state: Partial) -> Partial:
        ids = lax.dynamic_slice_in_dim(private, index * step_chunks, step_chunks, axis=1)
        k, v = kv.gather(ids)
        place = index * step_tokens + jnp.arange(step_tokens, dtype=jnp.int32)
        visible = reads.sees(place, remaining)
        return merge(state, _attend_rows(queries, k, v, attention, visible))

    steps = lax.div(jnp.max(remaining) + (step_tokens - 1), jnp.int32(step_tokens))
    start = empty((batch, group), head_dim)
    if reads.own is not None:
        own = reads.own
        k, v = (
            chunks.at[kv.stored.layer, kv.head, own.slots].get(mode="clip").astype(jnp.float32)
            for chunks in (own.keys, own.values)
        )
        start = _attend_rows(queries, k, v, attention, reads.sees_own(chunk_size))
    return lax.fori_loop(0, steps, step, start)


def _attend_rows(
    queries: Float32[Array, "B G D"],
    k: Float32[Array, "B T D"],
    v: Float32[Array, "B T D"],
    attention: AttentionSpec,
    visible: Bool[Array, "B T"],
) -> Partial:
    """Each row over tokens of its own, those that it sees: Partial [B, G]."""
    visible = visible[:, None]
    scores = jnp.einsum("bgd,btd->bgt", queries, k, precision=lax.Precision.HIGHEST)
    scores = jnp.where(visible, attention.cap(scores), MASKED)
    maximum = scores.max(axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0)
    output = jnp.einsum("bgt,btd->bgd", weights, v, precision=lax.Precision.HIGHEST)
    return Partial(output, maximum, weights.sum(axis=-1))
