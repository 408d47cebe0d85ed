"""The definition of prefill attention over the pool, written to be read: one dense softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.plans import PrefillPlan
from pallas_kernels.softcap import cap_scores


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
    """See `pallas_kernels.prefill_attention.api.prefill_attention`.

    Computes in float64 when q is float64, in float32 otherwise, and gathers the whole context of
    every token, so it is for small cases only.
    """
    tokens, num_heads, head_dim = q.shape
    kv_heads, num_chunks = keys.shape[1:3]
    compute = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    sequence, position = token_positions(plan, tokens)
    tables = jnp.minimum(plan.block_tables[sequence], num_chunks - 1)  # [T, P]

    def context(pool):  # [T, Hkv, P * C, D]
        gathered = jnp.moveaxis(pool[layer][:, tables], 0, 1)
        return gathered.reshape(tokens, kv_heads, -1, head_dim).astype(compute)

    highest = jax.lax.Precision.HIGHEST
    grouped = q.astype(compute).reshape(tokens, kv_heads, num_heads // kv_heads, head_dim)
    scores = jnp.einsum("thgd,thkd->thgk", grouped, context(keys), precision=highest) * scale
    scores = cap_scores(scores, softcap)
    visible = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] <= position[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    output = jnp.einsum("thgk,thkd->thgd", weights, context(values), precision=highest)
    output = jnp.where((position >= 0)[:, None, None, None], output, 0)
    return output.reshape(q.shape).astype(q.dtype)


def token_positions(plan: PrefillPlan, tokens: int):
    """Sequence and position of every packed token, int32 [T]; position -1 for padding."""
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    begin, end = plan.tile_begin[None], (plan.tile_begin + plan.tile_count)[None]
    used = (jnp.arange(begin.shape[1], dtype=jnp.int32) < plan.num_tiles)[None]
    inside = (token >= begin) & (token < end) & used
    tile = jnp.argmax(inside, axis=1)
    position = plan.tile_position[tile] + token[:, 0] - plan.tile_begin[tile]
    return plan.tile_sequence[tile], jnp.where(inside.any(axis=1), position, -1)
