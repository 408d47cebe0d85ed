"""The definition of prefill attention over the pool, written to be read: one dense softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.reference import times_in_items
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.plans import PrefillReads


def prefill_attention(
    q: Float[Array, "T Hq D"], stored: LayerKV, reads: PrefillReads, attention: AttentionSpec
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`.

    Computes in float64 when q is float64, in float32 otherwise, and scores every token against
    every slot of the pool, so it is for small cases only.
    """
    compute = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    highest = jax.lax.Precision.HIGHEST
    grouped = attention.heads.split(q.astype(compute))

    def scores_of(keys: Float[Array, "Hkv K D"], sees: Bool[Array, "T Hkv K"]):
        products = jnp.einsum("thgd,hkd->thgk", grouped, keys, precision=highest)
        scores = attention.cap(products * attention.scale)
        return jnp.where(sees[:, :, None], scores, -jnp.inf)

    def flat(chunks: Float[Array, "Hkv N C D"]) -> Float[Array, "Hkv slots D"]:
        return chunks.reshape(stored.kv_heads, -1, stored.head_dim).astype(compute)

    in_pool, among_new = [], []
    for head in range(stored.kv_heads):
        of_head = reads.by_head(jnp.int32(head))
        in_pool.append(_sees_in_pool(of_head, len(q), stored.num_chunks, stored.chunk_size))
        among_new.append(_sees_among_new(of_head, len(q), stored.chunk_size))
    scores = scores_of(flat(stored.all_keys()), jnp.stack(in_pool, axis=1))
    values = flat(stored.all_values())
    if reads.new is not None:
        new_keys, new_values = (
            jnp.moveaxis(x.astype(compute), 1, 0) for x in (reads.new.keys, reads.new.values)
        )
        own = scores_of(new_keys, jnp.stack(among_new, axis=1))
        scores = jnp.append(scores, own, axis=-1)
        values = jnp.append(values, new_values, axis=1)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    output = jnp.einsum("thgk,hkd->thgd", weights, values, precision=highest)
    output = output / weights.sum(axis=-1, keepdims=True)
    _, position = reads.plan.token_positions(len(q))
    output = jnp.where((position >= 0)[:, None, None, None], output, 0)
    return attention.heads.join(output).astype(q.dtype)


def _sees_in_pool(
    reads: PrefillReads, tokens: int, num_chunks: int, size: int
) -> Bool[Array, "T slots"]:
    """Which slots of the pool each token reads, by the plan of one head."""
    plan = reads.plan
    sequence, position = plan.token_positions(tokens)
    times = times_in_items(plan.items, tokens, num_chunks)
    times = jnp.broadcast_to(times[..., None], (*times.shape, size))
    tables, own = jnp.asarray(plan.block_tables)[sequence], jnp.asarray(plan.own_chunk)[sequence]
    index = jnp.arange(tables.shape[1] * size, dtype=jnp.int32)[None]  # in the table
    place = index - own[:, None] * size
    sees = (place >= 0) & (index <= position[:, None])
    if reads.new is not None:
        sees &= index // size < position[:, None] // size
    hidden = plan.hidden
    if hidden is not None:
        begin, offset = (jnp.asarray(x)[sequence] for x in (hidden.begin, hidden.offset))
        opens = position + 1 - hidden.size - offset
        sees &= (place < begin[:, None]) | (place >= opens[:, None])
    rows = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    by_chunk = sees.reshape(tokens, -1, size).astype(jnp.int32)
    return times.at[rows, tables].add(by_chunk, mode="drop").reshape(tokens, -1) > 0


def _sees_among_new(reads: PrefillReads, tokens: int, size: int) -> Bool[Array, "T T"]:
    """Which packed tokens each token reads, where it reads those of its own chunk there."""
    sequence, position = reads.plan.token_positions(tokens)
    sees = (sequence[:, None] == sequence[None]) & (position >= 0)[None]
    sees &= position[:, None] >= position[None]
    sees &= position[:, None] // size == position[None] // size
    hidden = reads.plan.hidden
    if hidden is not None:
        opens = (position + 1 - hidden.size)[:, None]
        sees &= (position[None] < hidden.sinks) | (position[None] >= opens)
    return sees
