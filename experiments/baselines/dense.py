"""Every row has its own keys and values in one piece, padded to the longest: no paging at all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, PyTree

from pallas_kernels.online_softmax import Partial

STEP_BYTES = 4 * 2**20
"""Keys and values attended to in one step: what stays in the caches of 2 CPU cores."""


@functools.partial(jax.jit, static_argnames="scale")
def dense_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv T D"],
    values: Float[Array, "B Hkv T D"],
    lengths: Int32[Array, " B"],
    *,
    scale: float | None = None,
) -> Float[Array, "B Hq D"]:
    """Softmax attention of one query per row over its first `lengths[b]` tokens, at least one.

    A few pairs of a row and a KV head at a time, which on 2 CPU cores takes as long as one batched
    product with one query head per KV head, and a third of it with several. Accumulates in float32.
    """
    batch, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    queries = grouped_queries(q, kv_heads, scale)

    def attend_pair(pair):
        row, head = lax.div(pair, kv_heads), lax.rem(pair, kv_heads)
        return attend(queries[row, head], keys[row, head], values[row, head], lengths[row])

    output = map_pairs(attend_pair, batch * kv_heads, keys.shape[2] * head_dim)
    return output.reshape(batch, num_heads, head_dim).astype(q.dtype)


def map_pairs(
    attend_pair: Callable, count: int, context: int
) -> PyTree[Float32[Array, "pairs ..."]]:
    """`attend_pair` of 0 to `count - 1`, as many together as `STEP_BYTES` allow.

    `context` is the number of elements of the keys of one pair, and of its values.
    """
    together = max(1, STEP_BYTES // (2 * 4 * context))
    together = min(count, 1 << together.bit_length() - 1)
    pairs = jnp.arange(count, dtype=jnp.int32)
    return lax.map(attend_pair, pairs, batch_size=together if together > 1 else None)


def grouped_queries(
    q: Float[Array, "B Hq D"], kv_heads: int, scale: float | None
) -> Float32[Array, "B Hkv G D"]:
    """Scaled queries in float32, by the KV head they read."""
    batch, num_heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scaled = q.astype(jnp.float32) * scale
    return scaled.reshape(batch, kv_heads, num_heads // kv_heads, head_dim)


def attend(
    queries: Float32[Array, "G D"],
    keys: Float[Array, "T D"],
    values: Float[Array, "T D"],
    length: Int32[Array, ""],
) -> Float32[Array, "G D"]:
    """One row and KV head: masked softmax over the first `length` tokens."""
    partial = attend_partial(queries, keys, values, length)
    return partial.output / partial.total[:, None]


def attend_partial(
    queries: Float32[Array, "R D"],
    keys: Float[Array, "T D"],
    values: Float[Array, "T D"],
    length: Int32[Array, ""] | None,
) -> Partial:
    """Attention over the first `length` tokens, or all, before it is divided by its total."""
    highest = lax.Precision.HIGHEST
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    scores = jnp.einsum("gd,td->gt", queries, keys, precision=highest)
    if length is not None:
        visible = jnp.arange(len(keys), dtype=jnp.int32) < length
        scores = jnp.where(visible[None], scores, -jnp.inf)
    maximum = scores.max(axis=-1)
    weights = jnp.exp(scores - maximum[:, None])
    output = jnp.einsum("gt,td->gd", weights, values, precision=highest)
    return Partial(output, maximum, weights.sum(axis=-1))


def dense_copies(
    pool: Float[Array, "L Hkv N C D"], tables: Sequence[Sequence[int]], *, layer: int = 0
) -> Float[Array, "B Hkv T D"]:
    """One layer's keys or values of every row, in whole chunks; T is that of the longest row."""
    return _gather_rows(pool, pad_tables(tables), layer)


@functools.partial(jax.jit, static_argnames="layer")
def _gather_rows(pool, tables, layer: int):
    _, kv_heads, _, chunk_size, head_dim = pool.shape
    batch, width = tables.shape
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    copies = pool[layer, heads, tables[:, None]]  # [B, Hkv, P, C, D]
    return copies.reshape(batch, kv_heads, width * chunk_size, head_dim)


def pad_tables(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Block tables as int32 [B, P]; chunk 0 pads them, which the row's length hides."""
    width = max(map(len, tables))
    padded = np.zeros((len(tables), width), np.int32)
    for row, chunks in enumerate(tables):
        padded[row, : len(chunks)] = chunks
    return padded
