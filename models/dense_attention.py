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


def dense_attend(
    positions: jax.Array, *, scale: float | None = None, softcap: float | None = None
) -> Attend:
    """Causal attention of the queries at `positions [T]` over everything written so far.

    Scores, weights and sums are in float32. `scale` and `softcap` are those of `CacheSpec`.
    """

    def attend(pool, layer, q, k, v):
        keys = pool[0].at[layer, positions].set(k)
        values = pool[1].at[layer, positions].set(v)
        group = q.shape[1] // k.shape[1]
        wide_keys = jnp.repeat(keys[layer], group, axis=1).astype(jnp.float32)
        wide_values = jnp.repeat(values[layer], group, axis=1).astype(jnp.float32)
        query = q.astype(jnp.float32) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        scores = jnp.einsum("thd,shd->hts", query, wide_keys, precision=PRECISION)
        visible = jnp.arange(keys.shape[1])[None, :] <= positions[:, None]
        capped = jnp.where(visible[None, :, :], cap_scores(scores, softcap), -jnp.inf)
        weights = jax.nn.softmax(capped, axis=-1)
        out = jnp.einsum("hts,shd->thd", weights, wide_values, precision=PRECISION)
        return out.astype(q.dtype), (keys, values)

    return attend


@functools.partial(jax.jit, static_argnums=0)
def run_dense(graphdef, state, tokens, positions, pool):
    """Logits `[T, V]` of `tokens [T]` and the grown pool, for an `nnx.split` decoder."""
    from flax import nnx

    model = nnx.merge(graphdef, state)
    spec = model.cache_spec
    attend = dense_attend(positions, scale=spec.scale, softcap=spec.softcap)
    hidden, pool = model(tokens, positions, pool, attend)
    return model.logits(hidden), pool
