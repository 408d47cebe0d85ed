"""The definition of prefill attention over the pool, written to be read: one dense softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.plans import PrefillPlan, PrefillReads


def prefill_attention(
    q: Float[Array, "T Hq D"], stored: LayerKV, reads: PrefillReads, attention: AttentionSpec
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`.

    Computes in float64 when q is float64, in float32 otherwise, and gathers the whole context of
    every token, so it is for small cases only.
    """
    tokens, _, head_dim = q.shape
    compute = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    sequence, position = token_positions(reads.plan, tokens)
    tables = jnp.minimum(reads.plan.block_tables[sequence], stored.num_chunks - 1)  # [T, P]

    def context(chunks: Float[Array, "Hkv N C D"]) -> Float[Array, "T Hkv context D"]:
        gathered = jnp.moveaxis(chunks[:, tables], 0, 1)
        return gathered.reshape(tokens, stored.kv_heads, -1, head_dim).astype(compute)

    highest = jax.lax.Precision.HIGHEST
    grouped = attention.heads.split(q.astype(compute))
    products = jnp.einsum("thgd,thkd->thgk", grouped, context(stored.all_keys()), precision=highest)
    scores, values = attention.cap(products * attention.scale), context(stored.all_values())
    key_position = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
    visible = key_position <= position[:, None]
    new, size = reads.new, stored.chunk_size
    if new is not None:
        visible = key_position // size < position[:, None] // size
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if new is not None:
        keys, own = (jnp.moveaxis(x.astype(compute), 1, 0) for x in (new.keys, new.values))
        products = jnp.einsum("thgd,hkd->thgk", grouped, keys, precision=highest)
        sees = (sequence[:, None] == sequence[None]) & (position >= 0)[None]
        sees &= position[:, None] >= position[None]
        sees &= position[:, None] // size == position[None] // size
        products = attention.cap(products * attention.scale)
        scores = jnp.append(scores, jnp.where(sees[:, None, None], products, -jnp.inf), axis=-1)
        own = jnp.broadcast_to(own, (tokens, *own.shape))
        values = jnp.append(values, own, axis=2)
    weights = jax.nn.softmax(scores, axis=-1)
    output = jnp.einsum("thgk,thkd->thgd", weights, values, precision=highest)
    output = jnp.where((position >= 0)[:, None, None, None], output, 0)
    return attention.heads.join(output).astype(q.dtype)


def token_positions(
    plan: PrefillPlan, tokens: int
) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
    """Sequence and position of every packed token; position -1 for padding."""
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    begin, end = plan.tile_begin[None], (plan.tile_begin + plan.tile_count)[None]
    used = (jnp.arange(begin.shape[1], dtype=jnp.int32) < plan.num_tiles)[None]
    inside = (token >= begin) & (token < end) & used
    tile = jnp.argmax(inside, axis=1)
    position = plan.tile_position[tile] + token[:, 0] - plan.tile_begin[tile]
    return plan.tile_sequence[tile], jnp.where(inside.any(axis=1), position, -1)
