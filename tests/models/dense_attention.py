"""The plainest `attend`: dense keys and values, one sequence, for testing a decoder by itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_chunkattn.model_interface import Attend, CacheSpec

PRECISION = jax.lax.Precision.HIGHEST


def empty_pool(
    spec: CacheSpec, capacity: int, dtype: DTypeLike = "float32"
) -> tuple[jax.Array, jax.Array]:
    """Keys and values, each `[L, capacity, Hkv, D]`."""
    shape = (spec.num_layers, capacity, spec.num_kv_heads, spec.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def dense_attend(positions: jax.Array) -> Attend:
    """Causal attention of the queries at `positions [T]` over everything written so far."""

    def attend(pool, layer, q, k, v):
        keys = pool[0].at[layer, positions].set(k)
        values = pool[1].at[layer, positions].set(v)
        group = q.shape[1] // k.shape[1]
        wide_keys = jnp.repeat(keys[layer], group, axis=1).astype(jnp.float32)
        wide_values = jnp.repeat(values[layer], group, axis=1).astype(jnp.float32)
        query = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.einsum("thd,shd->hts", query, wide_keys, precision=PRECISION)
        visible = jnp.arange(keys.shape[1])[None, :] <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(visible[None, :, :], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("hts,shd->thd", weights, wide_values, precision=PRECISION)
        return out.astype(q.dtype), (keys, values)

    return attend


@functools.partial(jax.jit, static_argnums=0)
def run_dense(graphdef, state, tokens, positions, pool):
    """Logits `[T, V]` of `tokens [T]` and the grown pool, for an `nnx.split` decoder."""
    from flax import nnx

    model = nnx.merge(graphdef, state)
    hidden, pool = model(tokens, positions, pool, dense_attend(positions))
    return model.logits(hidden), pool
