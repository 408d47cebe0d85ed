"""What each query that asks chooses: columns of chunks, for itself and those right after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.selection.asking import Asking
from pallas_kernels.selection.descent import descend
from pallas_kernels.selection.estimates import CompiledEstimate, Estimate
from pallas_kernels.selection.scoring import chunk_scores
from pallas_kernels.selection.selector import ChunkSelector


def choose(
    q: Float[Array, "R Hq D"],
    asking: Asking,
    estimate: Estimate | CompiledEstimate,
    attention: AttentionSpec,
    selector: ChunkSelector,
) -> Int32[Array, "A K"]:
    """The columns of the chunks that each query that asks reads, its own among them, in ascending
    order; P behind the last of them."""
    candidates = asking.chunk - selector.recent - selector.sinks
    wanted = jnp.asarray(selector.counts(asking.columns))[asking.chunk]
    wanted = wanted - jnp.minimum(asking.chunk + 1, selector.sinks + selector.recent + 1)
    most = max(1, selector.most_chosen(asking.columns))
    if selector.policy == "hip":
        assert isinstance(estimate, Estimate), "the kernel scores all chunks"
        chosen = descend(
            q, asking, estimate, attention, selector.sinks, candidates, wanted, most=most
        )
    else:
        scores = _yardstick(asking, selector)
        if scores is None:
            scores = chunk_scores(q, asking, estimate, attention)
        chosen = best_columns(scores, selector.sinks, candidates, wanted, most=most)
    return _with_those_always_read(chosen, asking, selector)


def _yardstick(asking: Asking, selector: ChunkSelector) -> Float32[Array, "A P"] | None:
    """Scores that look at nothing; None of a policy that does look."""
    column = jnp.arange(asking.columns, dtype=jnp.int32)
    if selector.policy == "recent":
        return jnp.broadcast_to(column.astype(jnp.float32), (len(asking.chunk), asking.columns))
    if selector.policy != "random":
        return None
    # Of a query's chunk and the column alone: two queries of a chunk read the same.
    keys = jax.vmap(jax.random.key)(asking.chunk)
    return jax.vmap(lambda key: jax.random.uniform(key, column.shape))(keys)


def best_columns(
    scores: Float32[Array, "A P"],
    first: int,
    candidates: Int32[Array, " A"],
    wanted: Int32[Array, " A"],
    *,
    most: int,
) -> Int32[Array, "A most"]:
    """The `wanted` best of so many columns from the `first` on, of equal ones the first; P for the
    rest."""
    columns = scores.shape[1]
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    eligible = (column >= first) & (column < first + candidates[:, None])
    _, best = lax.top_k(jnp.where(eligible, jnp.nan_to_num(scores), -1), min(most, columns))
    place = jnp.arange(best.shape[1], dtype=jnp.int32)[None]
    return jnp.where(place < wanted[:, None], best, columns)


def _with_those_always_read(
    chosen: Int32[Array, "A most"], asking: Asking, selector: ChunkSelector
) -> Int32[Array, "A K"]:
    own = asking.chunk[:, None]
    sinks = jnp.arange(selector.sinks, dtype=jnp.int32)[None]
    sinks = jnp.where(sinks < own - selector.recent, sinks, asking.columns)
    recent = own - jnp.arange(selector.recent + 1, dtype=jnp.int32)[None]
    recent = jnp.where(recent >= 0, recent, asking.columns)
    ordered = jnp.sort(jnp.concatenate([sinks, chosen, recent], axis=1), axis=1)
    most = selector.most_read(asking.columns)
    room = max(0, most - ordered.shape[1])
    ordered = jnp.pad(ordered, ((0, 0), (0, room)), constant_values=asking.columns)
    return ordered[:, :most]
