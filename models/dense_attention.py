"""The plainest `attend`: dense keys and values of one sequence, and no cache to share.

What a decoder computes by itself, for tests and for comparisons with the chunk pool.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_chunkattn.device.model_interface import Attend, CacheSpec
from pallas_kernels.softcap import cap_scores

PRECISION = jax.lax.Precision.HIGHEST


def empty_pool(
    spec: CacheSpec, capacity: int, dtype: DTypeLike = "float32"
) -> tuple[jax.Array, jax.Array]:
    """Keys and values, each `[L, capacity, Hkv, D]`."""
    shape = (spec.num_layers, capacity, spec.num_kv_heads, spec.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def dense_attend(positions: jax.Array, spec: CacheSpec) -> Attend:
    """Causal attention of the queries at `positions [T]` over what was written so far and their
    windows let them see.

    Scores, weights and sums are in float32.
    """

    def attend(pool, layer, q, k, v):
        keys = pool[0].at[layer, positions].set(k)
        values = pool[1].at[layer, positions].set(v)
        scores = attention_scores(spec, q, keys[layer])
        visible = visible_tokens(spec, layer, positions, keys.shape[1])
        out = weighted_values(attention_weights(scores, visible), values[layer])
        return out.astype(q.dtype), (keys, values)

    return attend


def sequence_attend(spec: CacheSpec) -> Attend:
    """Attention within one sequence that begins at position 0; whatever is handed in as the pool
    stays as it is."""

    def attend(pool, layer, q, k, v):
        visible = visible_tokens(spec, layer, jnp.arange(len(q), dtype=jnp.int32), len(q))
        weights = attention_weights(attention_scores(spec, q, k), visible)
        return weighted_values(weights, v).astype(q.dtype), pool

    return attend


def behind_attend(spec: CacheSpec, keys: jax.Array, values: jax.Array) -> Attend:
    """Attention within one sequence that comes behind given keys and values `[L, S, Hkv, D]`, of
    positions from 0 on; whatever is handed in as the pool stays as it is."""
    begin = keys.shape[1]

    def attend(pool, layer, q, k, v):
        positions = jnp.arange(begin + len(q), dtype=jnp.int32)
        all_keys = jnp.concatenate([keys[layer].astype(k.dtype), k])
        all_values = jnp.concatenate([values[layer].astype(v.dtype), v])
        visible = visible_positions(spec, layer, positions[begin:], positions)
        weights = attention_weights(attention_scores(spec, q, all_keys), visible)
        return weighted_values(weights, all_values).astype(q.dtype), pool

    return attend


def attention_scores(spec: CacheSpec, q: jax.Array, keys: jax.Array) -> jax.Array:
    """Of queries `q [T, Hq, D]` and `keys [S, Hkv, D]`: `[Hq, T, S]` float32."""
    scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
    wide = jnp.repeat(keys, q.shape[1] // keys.shape[1], axis=1).astype(jnp.float32)
    query = q.astype(jnp.float32) * scale
    scores = jnp.einsum("thd,shd->hts", query, wide, precision=PRECISION)
    return cap_scores(scores, spec.softcap)


def attention_weights(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Of `scores [Hq, T, S]`, over what is `visible [Hkv, T, S]`: `[Hq, T, S]`, sums of 1."""
    seen = jnp.repeat(visible, len(scores) // len(visible), axis=0)
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def weighted_values(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sums of `values [S, Hkv, D]` by `weights [Hq, T, S]`: `[T, Hq, D]` float32."""
    wide = jnp.repeat(values, len(weights) // values.shape[1], axis=1).astype(jnp.float32)
    return jnp.einsum("hts,shd->thd", weights, wide, precision=PRECISION)


def visible_tokens(
    spec: CacheSpec, layer: jax.Array, positions: jax.Array, capacity: int
) -> jax.Array:
    """Whether the queries at `positions [T]` see each of the first tokens: `[Hkv, T, capacity]`."""
    return visible_positions(spec, layer, positions, jnp.arange(capacity))


def visible_positions(
    spec: CacheSpec, layer: jax.Array, queries: jax.Array, keys: jax.Array
) -> jax.Array:
    """Whether the queries at positions `[T]` see the keys at positions `[S]`: `[Hkv, T, S]`."""
    key, query = keys[None, None], queries[None, :, None]
    visible = jnp.broadcast_to(key <= query, (spec.num_kv_heads, len(queries), len(keys)))
    windows = spec.window_sizes(layer)
    if windows is None:
        return visible
    size, sinks = (numbers[:, None, None] for numbers in windows)
    return visible & ((key < sinks) | (key > query - size))


@functools.partial(jax.jit, static_argnums=0)
def run_dense(graphdef, state, tokens, positions, pool):
    """Logits `[T, V]` of `tokens [T]` and the grown pool, for an `nnx.split` decoder."""
    from flax import nnx

    model = nnx.merge(graphdef, state)
    attend = dense_attend(positions, model.cache_spec)
    hidden, pool = model(tokens, positions, pool, attend)
    return model.logits(hidden), pool
