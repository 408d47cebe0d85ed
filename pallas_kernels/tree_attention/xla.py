"""Attention within a packed tree in plain JAX, one KV head at a time, in tiles, with its gradients.

Forward, the weights of a query tile over its key tiles are an online softmax. Backward, each key
tile goes through the query tiles below it, whose weights follow from the logarithms of their sums
(Dao, arXiv 2307.08691, algorithms 1 and 2). Both loops run as often as the plan needs.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.online_softmax import MASKED, Partial, empty, normalise
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.tree_attention.plan import HeadWindows, TreePlan

KEPT = "tree_attention"
"""What the backward pass reads of the forward pass is named so, for `jax.checkpoint`."""


class HeadOperands(NamedTuple):
    """What one KV head reads, and its G query heads."""

    queries: Float[Array, "T G D"]
    keys: Float[Array, "T D"]
    values: Float[Array, "T D"]
    window: tuple[Int32[HostOrDevice, "*H"], Int32[HostOrDevice, "*H"]] | None  # its size and sinks


class HeadResult(NamedTuple):
    """What its query heads get, and the logarithm of the sum of each query's exponentials."""

    output: Float32[Array, "T G D"]
    log_total: Float32[Array, "T G"]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def tree_attention(
    q: Float[Array, "T Hq D"],
    keys: Float[Array, "T Hkv D"],
    values: Float[Array, "T Hkv D"],
    plan: TreePlan,
    windows: HeadWindows | None,
    attention: AttentionSpec,
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.tree_attention.api.tree_attention`."""
    return _forward(q, keys, values, plan, windows, attention)[0]


def _forward(q, keys, values, plan: TreePlan, windows: HeadWindows | None, attention):
    """The output, and what the backward pass needs."""
    operands = _by_head(q, keys, values, windows)
    results = lax.map(lambda of_head: _attend_head(of_head, plan, attention), operands)
    output = checkpoint_name(_join_heads(results.output).astype(q.dtype), KEPT)
    log_total = checkpoint_name(results.log_total, KEPT)
    return output, (q, keys, values, output, log_total, plan, windows)


def _backward(attention: AttentionSpec, residuals, gradient: Float[Array, "T Hq D"]):
    """Gradients of queries, keys and values, by that of the output; the plan has none."""
    q, keys, values, output, log_total, plan, windows = residuals
    operands = _by_head(q, keys, values, windows)
    of_outputs = _split_heads(gradient, keys.shape[1]).astype(jnp.float32)
    # A query's weights change as much as these say, whatever the scores: softmax sums to 1.
    wide = _split_heads(output, keys.shape[1]).astype(jnp.float32)
    common = jnp.sum(of_outputs * wide, axis=-1)

    def of_head(given):
        operands, log_total, of_outputs, common = given
        return _head_gradients(operands, log_total, of_outputs, common, plan, attention)

    of_q, of_keys, of_values = lax.map(of_head, (operands, log_total, of_outputs, common))
    return (
        _join_heads(of_q).astype(q.dtype),
        jnp.swapaxes(of_keys, 0, 1).astype(keys.dtype),
        jnp.swapaxes(of_values, 0, 1).astype(values.dtype),
        None,
        None,
    )


tree_attention.defvjp(_forward, _backward)


def _by_head(q, keys, values, windows: HeadWindows | None) -> HeadOperands:
    """The operands, with KV heads first."""
    return HeadOperands(
        _split_heads(q, keys.shape[1]),
        jnp.swapaxes(keys, 0, 1),
        jnp.swapaxes(values, 0, 1),
        None if windows is None else (windows.sizes, windows.sinks),
    )


def _split_heads(x: Float[Array, "T Hq D"], kv_heads: int) -> Float[Array, "Hkv T G D"]:
    return jnp.moveaxis(x.reshape(len(x), kv_heads, -1, x.shape[-1]), 1, 0)


def _join_heads(x: Float[Array, "Hkv T G D"]) -> Float[Array, "T Hq D"]:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1])


def _tile_of(
    x: Float[Array, "T G D"], index: Int32[Array, ""], tile: int
) -> Float32[Array, "rows D"]:
    """Tile `index` of some tokens, with a row for each of their heads, in float32."""
    part = lax.dynamic_slice_in_dim(x, index * tile, tile).astype(jnp.float32)
    return part.reshape(-1, x.shape[-1])


def _multiply(x: Float32[Array, "M K"], y: Float32[Array, "K N"]) -> Float32[Array, "M N"]:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _seen(operands: HeadOperands, plan: TreePlan, query_tile, key_tile):
    """Whether the query heads of a tile see a tile of tokens: `[tile * G, tile]`."""
    first = query_tile * plan.tile, key_tile * plan.tile
    seen = plan.sees(*first, plan.tile, operands.window)
    return jnp.repeat(seen, operands.queries.shape[1], axis=0)


def _attend_head(operands: HeadOperands, plan: TreePlan, attention: AttentionSpec) -> HeadResult:
    group, head_dim = operands.queries.shape[1:]

    def attend_tile(query_tile):
        queries = _tile_of(operands.queries, query_tile, plan.tile) * attention.scale

        def add_tile(pair, state: Partial) -> Partial:
            key_tile = jnp.asarray(plan.key_tiles)[pair]
            keys = _tile_of(operands.keys[:, None], key_tile, plan.tile)
            values = _tile_of(operands.values[:, None], key_tile, plan.tile)
            seen = _seen(operands, plan, query_tile, key_tile)
            scores = attention.cap(_multiply(queries, keys.T))
            scores = jnp.where(seen, scores, MASKED)
            maximum = jnp.maximum(state.maximum, scores.max(axis=1))
            weights = jnp.exp(scores - maximum[:, None])
            shrink = jnp.exp(state.maximum - maximum)
            output = state.output * shrink[:, None] + _multiply(weights, values)
            return Partial(output, maximum, state.total * shrink + weights.sum(axis=1))

        begin, end = plan.pair_begin[query_tile], plan.pair_begin[query_tile + 1]
        # Above what is masked, so that its weights are 0 for queries that have seen nothing yet.
        none = empty((plan.tile * group,), head_dim)
        none = none._replace(maximum=none.maximum / 2)
        state = lax.fori_loop(begin, end, add_tile, none)
        some = state.total > 0
        log_total = jnp.where(some, state.maximum + jnp.log(jnp.where(some, state.total, 1)), 0)
        return HeadResult(normalise(state), log_total)

    tiles = jnp.arange(len(plan.last_query_tile), dtype=jnp.int32)
    results = lax.map(attend_tile, tiles)
    return HeadResult(
        results.output.reshape(-1, group, head_dim), results.log_total.reshape(-1, group)
    )


def _head_gradients(
    operands: HeadOperands,
    log_total: Float32[Array, "T G"],
    gradient: Float32[Array, "T G D"],
    common: Float32[Array, "T G"],
    plan: TreePlan,
    attention: AttentionSpec,
):
    """Gradients of one KV head's queries `[T, G, D]`, keys and values `[T, D]`, in float32."""
    tile, (tokens, group, head_dim) = plan.tile, operands.queries.shape

    def of_key_tile(of_queries, key_tile):
        keys = _tile_of(operands.keys[:, None], key_tile, tile)
        values = _tile_of(operands.values[:, None], key_tile, tile)

        def add_tile(query_tile, sums):
            of_queries, of_keys, of_values = sums
            queries = _tile_of(operands.queries, query_tile, tile) * attention.scale
            of_output = _tile_of(gradient, query_tile, tile)
            logs = _tile_of(log_total[..., None], query_tile, tile)
            mean = _tile_of(common[..., None], query_tile, tile)
            scores = attention.cap(_multiply(queries, keys.T))
            seen = _seen(operands, plan, query_tile, key_tile)
            weights = jnp.exp(jnp.where(seen, scores - logs, MASKED))
            of_scores = weights * (_multiply(of_output, values.T) - mean)
            if attention.softcap is not None:
                of_scores = of_scores * (1 - jnp.square(scores / attention.softcap))
            added = _multiply(of_scores, keys) * attention.scale
            begin = query_tile * tile * group
            before = lax.dynamic_slice_in_dim(of_queries, begin, tile * group)
            return (
                lax.dynamic_update_slice_in_dim(of_queries, before + added, begin, axis=0),
                of_keys + _multiply(of_scores.T, queries),
                of_values + _multiply(weights.T, of_output),
            )

        none = jnp.zeros((tile, head_dim), jnp.float32)
        end = plan.last_query_tile[key_tile] + 1
        sums = lax.fori_loop(key_tile, end, add_tile, (of_queries, none, none))
        return sums[0], sums[1:]

    none = jnp.zeros((tokens * group, head_dim), jnp.float32)
    tiles = jnp.arange(tokens // tile, dtype=jnp.int32)
    of_queries, (of_keys, of_values) = lax.scan(of_key_tile, none, tiles)
    shape = (tokens, head_dim)
    return of_queries.reshape(tokens, group, head_dim), *(
        array.reshape(shape) for array in (of_keys, of_values)
    )
