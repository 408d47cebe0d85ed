"""When CORM drops which key of which head: one forward pass over a sequence.

A key is important to a query at position t (from 0) if its weight in the query's softmax is at
least 1 / (t + 1): above the mean. It is dropped at the first query behind its R newest tokens at
which none of the last R queries found it important (arXiv 2404.15949, with w = r = R). A KV head
drops a key when all the query heads that read it would.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int32

from jax_chunkattn import CacheSpec
from models import Decoder
from models.dense_attention import attention_scores, attention_weights, weighted_values

_PADDED = 256  # sequences are padded to a multiple of this, so that few lengths are compiled


def drop_times(
    model: Decoder, tokens: Sequence[int], recent: Sequence[int]
) -> tuple[Int32[np.ndarray, "R L Hq T"], Int32[np.ndarray, "R L Hkv T"]]:
    """The position of the query from which on each key is dropped, T where it never is.

    By each number R of recent queries and tokens; of query heads and of KV heads. Every query sees
    all tokens up to itself, whether they are dropped or not.

    Raises:
      ValueError: for a model whose heads see windows: a window drops keys by itself.
    """
    spec = model.cache_spec
    if spec.different_windows:
        raise ValueError("its heads see windows, which drop keys by themselves")
    length = len(tokens)
    padded = np.zeros(-(-length // _PADDED) * _PADDED, np.int32)
    padded[:length] = tokens
    by_query, by_kv = (
        np.minimum(np.asarray(times)[..., :length], length)
        for times in _drop_times(*nnx.split(model), padded, tuple(recent))
    )
    return by_query, by_kv


@partial(jax.jit, static_argnums=(0, 3))
def _drop_times(graphdef, state, tokens, recent):
    model = nnx.merge(graphdef, state)
    spec: CacheSpec = model.cache_spec
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    causal = positions[None] <= positions[:, None]
    group = spec.num_heads // spec.num_kv_heads
    one_head = CacheSpec(1, 1, spec.head_dim, group, scale=spec.scale, softcap=spec.softcap)

    def attend(found, layer, q, k, v):
        def attend_head(operands):
            queries, keys, values = operands
            scores = attention_scores(one_head, queries, keys[:, None])
            weights = attention_weights(scores, causal[None])
            important = weights * (positions + 1).astype(jnp.float32)[None, :, None] >= 1
            important = jnp.concatenate([important, important.any(axis=0, keepdims=True)])
            times = _first_unneeded(important, recent)
            return weighted_values(weights, values[:, None]), times[:-1], times[-1]

        grouped = jnp.moveaxis(q.reshape(len(tokens), -1, group, q.shape[-1]), 1, 0)
        heads = grouped, jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)
        out, each, together = lax.map(attend_head, heads)
        by_query, by_kv = found
        each = each.reshape(-1, len(recent), len(tokens))
        by_query = by_query.at[:, layer].set(jnp.moveaxis(each, 1, 0))
        by_kv = by_kv.at[:, layer].set(jnp.moveaxis(together, 1, 0))
        return jnp.moveaxis(out, 0, 1).reshape(q.shape).astype(q.dtype), (by_query, by_kv)

    shape = len(recent), spec.num_layers
    found = tuple(
        jnp.zeros((*shape, heads, len(tokens)), jnp.int32)
        for heads in (spec.num_heads, spec.num_kv_heads)
    )
    _, found = model(tokens, positions, found, attend)
    return found


def _first_unneeded(
    important: Bool[Array, "H T S"], recent: tuple[int, ...]
) -> Int32[Array, "H R S"]:
    """The first query at which a key may go, by each number of recent ones; T if there is none."""
    heads, queries, keys = important.shape
    numbers = jnp.array(recent, jnp.int32)[None, :, None]
    key = jnp.arange(keys, dtype=jnp.int32)[None, None]

    def step(state, now):
        last, times = state
        query, found = now
        last = jnp.where(found, query, last)
        gone = (query - jnp.maximum(last[:, None], key) >= numbers) & (times == queries)
        return (last, jnp.where(gone, query, times)), None

    state = (
        jnp.full((heads, keys), -queries, jnp.int32),
        jnp.full((heads, len(recent), keys), queries, jnp.int32),
    )
    each = jnp.arange(queries, dtype=jnp.int32), jnp.moveaxis(important, 1, 0)
    (_, times), _ = lax.scan(step, state, each)
    return times


def shares(times: Int32[np.ndarray, "*H T"], size: int, first: int, begin: int) -> dict[str, float]:
    """How much of a sequence is dropped, in units of `size` tokens that are dropped as one.

    Of the units from token `first` on, a multiple of `size`, whatever the leading axes of `times`.
    A unit is there from its first token on, and dropped when its last token is.

    Args:
      begin: position of the first query that counts; those behind it all do.

    Returns:
      `reads`: of what all these queries would read, how much they need not. `end`: of what is there
      at the last query, how much is dropped.
    """
    length = times.shape[-1]
    units = -(-(length - first) // size)
    padded = np.full((*times.shape[:-1], units * size), length)  # what is not full is not dropped
    padded[..., : length - first] = times[..., first:]
    dropped = padded.reshape(*times.shape[:-1], units, size).max(axis=-1)
    made = np.maximum(first + size * np.arange(units), begin)
    queries = (length - made).sum() * (dropped.size // units)
    return {
        "reads": float((length - np.maximum(dropped, made)).sum() / queries),
        "end": float((dropped < length).mean()),
    }
