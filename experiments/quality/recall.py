"""How much of their attention queries keep when they read a part of what is before them.

Of each query head the softmax over all tokens up to the query's own, and the share of it that lies
in the chunks that its layer has chosen: attention recall. What the layers before have computed is
that of a model that reads everything, so a choice is judged by itself.

Letters: P tokens of the prefix, W windows, T tokens of a window, C of a chunk, N chunks of a prefix
and a window, A queries that choose, Hq query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from experiments.quality.scoring import Passage
from jax_chunkattn.device.model_interface import Attend, CacheSpec
from models import Decoder
from models.dense_attention import (
    attention_scores,
    attention_weights,
    sequence_attend,
    visible_tokens,
)
from pallas_kernels.plans import WorkItems
from pallas_kernels.selection import Asking, ChunkSelector, Landmarks, choose
from pallas_kernels.stored_kv import StoredKV


@dataclass(frozen=True)
class Recall:
    """Over layers that choose, query heads and queries."""

    mean: float
    fifth: float  # percentile

    @classmethod
    def of(
        cls, model: Decoder, passage: Passage, selector: ChunkSelector, chunk_size: int
    ) -> Recall | None:
        """Of the queries of all windows; None for a model some of whose heads have windows."""
        spec = model.cache_spec
        if spec.different_windows:
            return None
        split = nnx.split(model)
        choosing = np.setdiff1d(np.arange(spec.num_layers), selector.dense_layers)
        programmed = replace(selector, dense_layers=())
        kept = [
            np.asarray(_kept(*split, np.concatenate([passage.prefix, window]), how))[choosing]
            for window in passage.inputs
            for how in [_How(programmed, chunk_size, len(passage.prefix))]
        ]
        shares = np.concatenate([one.ravel() for one in kept])
        return cls(float(shares.mean()), float(np.percentile(shares, 5)))


@dataclass(frozen=True)
class _How:
    """What the program depends on."""

    selector: ChunkSelector
    chunk_size: int
    begin: int  # of the window


@partial(jax.jit, static_argnums=(0, 3))
def _kept(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Int32[Array, "P+T ..."], how: _How
) -> Float[Array, "L A Hq"]:
    """Shares of the attention of the queries of a window that choose."""
    model = nnx.merge(graphdef, state)
    spec, positions = model.cache_spec, jnp.arange(len(tokens), dtype=jnp.int32)
    queries = np.arange(how.begin, len(tokens), how.selector.refresh)
    shares = jnp.zeros(
        (spec.num_layers, len(queries), spec.attention.heads.query_heads), jnp.float32
    )
    return model(tokens, positions, shares, _attend(spec, jnp.asarray(queries, jnp.int32), how))[1]


def _attend(spec: CacheSpec, queries: Int32[Array, " A"], how: _How) -> Attend:
    """Attention to everything, with the shares in place of a pool."""
    whole = sequence_attend(spec)

    def attend(shares, layer, q, k, v):
        output, _ = whole(None, layer, q, k, v)
        by_chunk = _by_chunk(spec, layer, queries, q, k, how)
        chosen = _chosen(spec, queries, q, k, how)
        kept = jnp.where(chosen[:, None], by_chunk, 0).sum(axis=2)
        return output, shares.at[layer].set(kept)

    return attend


def _by_chunk(spec, layer, queries, q, k, how: _How) -> Float[Array, "A Hq N"]:
    """The attention of the queries that lies in each chunk."""
    visible = visible_tokens(spec, layer, queries, len(k))
    weights = attention_weights(attention_scores(spec, q[queries], k), visible)
    room = -len(k) % how.chunk_size
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, room)))
    return weights.reshape(*weights.shape[:2], -1, how.chunk_size).sum(axis=3).swapaxes(0, 1)


def _chosen(spec, queries, q, k, how: _How) -> Bool[Array, "A N"]:
    """Which chunks the queries read."""
    size, selector, layer = how.chunk_size, how.selector, jnp.int32(0)
    keys = jnp.pad(k, ((0, -len(k) % size), (0, 0), (0, 0))).swapaxes(0, 1)
    keys = keys.reshape(1, spec.num_kv_heads, -1, size, spec.head_dim)
    stored, columns = StoredKV(keys, keys, 0), keys.shape[2]
    kept = Landmarks.of(selector, encoded=False)
    estimate = kept.estimate(kept.make(keys), stored, layer)
    asking = _asking(queries, columns, size)
    found = choose(q, asking, estimate, spec.attention, selector)
    number = jnp.asarray(selector.counts(columns))[asking.chunk]
    rows = jnp.arange(len(queries), dtype=jnp.int32)[:, None]
    chosen = jnp.zeros((len(queries), columns), jnp.bool_).at[rows, found].set(True, mode="drop")
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    return jnp.where((number > asking.chunk)[:, None], column <= asking.chunk[:, None], chosen)


def _asking(queries: Int32[Array, " A"], columns: int, chunk_size: int) -> Asking:
    """The queries of one sequence, of which no item has a chunk."""
    none, table = jnp.zeros(1, jnp.int32), jnp.arange(columns, dtype=jnp.int32)[None]
    nothing = jnp.zeros(len(queries), jnp.int32)
    return Asking(
        queries,
        jnp.int32(len(queries)),
        queries // chunk_size,
        nothing,
        nothing,
        table,
        WorkItems(none, none, none, none, none, jnp.int32(0)),
        none,
    )
