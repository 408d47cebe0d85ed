"""What the Triton kernels share: a tile of queries attending to a run of chunks.

Scores are kept in units of log2, because the GPU computes powers of two. A *query row* is one
query head of one token; R rows with G query heads for a KV head are R * G query rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.online_softmax import MASKED, Partial
from pallas_kernels.triton_shape import KernelShape

LOG2_E = math.log2(math.e)
SMALL_TILE = 16  # query rows; the least that tensor cores take


class Tile(NamedTuple):
    """Some tokens of a run; keys and values are read when asked for."""

    token: Int32[Array, " T"]  # counted from the run's first
    there: Bool[Array, " T"]  # whether the run has it
    chunk: Int32[Array, "*T"]  # that it is in, of the run's; one number if all are in the same
    keys: Callable[[], Float[Array, "T Dp"]]
    values: Callable[[], Float[Array, "T Dp"]]


class ChoiceRefs(NamedTuple):
    """Which chunks of an item each query has chosen, in a kernel."""

    columns: Any  # a reference [*W K]
    by_row: Any  # a reference [*W B P]
    window: tuple[jax.Array, ...]
    begin: jax.Array  # of the item's chunks
    row: Int32[Array, " R"]
    inside: Bool[Array, " R"]

    def reads(self, tile: Tile) -> Bool[Array, "R tokens"]:
        """Whether each query has chosen the chunk that these tokens are in, or the chunks."""
        place = (*self.window, self.begin + tile.chunk)
        row, mask = self.row[:, None], self.inside[:, None]
        if tile.chunk.ndim:
            mask = mask & tile.there[None]
            column = plt.load(self.columns.at[place], mask=tile.there, other=0)[None]
        else:
            column = jnp.broadcast_to(self.columns[place], row.shape)
        return plt.load(self.by_row.at[(*self.window, row, column)], mask=mask, other=0) != 0


class Hidden(NamedTuple):
    """Tokens of a run that a window hides: from `begin` up to an end for each query."""

    begin: Int32[Array, ""]
    end: Int32[Array, " R"]


@runtime_checkable
class Tiles(Protocol):
    """The keys and values of a run of tokens that a loop goes over."""

    def steps(self) -> Int32[Array, ""]:
        """How many steps the loop has."""
        ...

    def at(self, step: Int32[Array, ""]) -> list[Tile]:
        """The tiles of a step."""
        ...


def attend(
    queries: Float[Array, "R Dp"],
    run: Tiles,
    shape: KernelShape,
    *,
    first_seen: Int32[Array, " R"] | None = None,
    last_seen: Int32[Array, " R"] | None = None,
    hidden: Hidden | None = None,
    chosen: ChoiceRefs | None = None,
    start: Partial | None = None,
) -> Partial:
    """Attention over the tokens of `run`, merged with `start`, in log2 units: Partial [R].

    `first_seen` and `last_seen` are the first and the last token of the run that each query sees,
    None for all; of those between, `hidden` are not seen, and of chunks only those `chosen`. A
    query that matters sees a token of `start`, of this run or of one that has the result for its
    start: until it does, its output is any finite number. With `chosen` it may see none at all.
    """
    precision = lax.Precision.HIGHEST if shape.dtype == jnp.float32 else None

    def scores_of(tile: Tile) -> Float32[Array, "R T"]:
        scores = _scores(plt.dot(queries, tile.keys().T, precision=precision), shape.attention)
        visible = tile.there[None]
        if first_seen is not None:
            visible = visible & (tile.token[None] >= first_seen[:, None])
        if last_seen is not None:
            visible = visible & (tile.token[None] <= last_seen[:, None])
        if hidden is not None:
            token = tile.token[None]
            visible = visible & ((token < hidden.begin) | (token >= hidden.end[:, None]))
        if chosen is not None:
            visible = visible & chosen.reads(tile)
        return jnp.where(visible, scores, MASKED)

    def step(index, state: Partial) -> Partial:
        tiles = run.at(index)
        scores = [scores_of(tile) for tile in tiles]
        maximum = jnp.maximum(state.maximum, reduce(jnp.maximum, scores).max(axis=1))
        if chosen is not None:  # above what is masked: weights are 0 where a query sees nothing
            maximum = jnp.maximum(maximum, MASKED / 2)
        keep = jnp.exp2(state.maximum - maximum)
        weights = [jnp.exp2(of_tile - maximum[:, None]) for of_tile in scores]
        output = state.output
        for index, (weight, tile) in enumerate(zip(weights, tiles, strict=True)):
            v = tile.values()
            kept = output if index else output * keep[:, None]
            output = kept + plt.dot(weight.astype(v.dtype), v, precision=precision)
        return Partial(output, maximum, state.total * keep + reduce(jnp.add, weights).sum(axis=1))

    if start is None:
        rows = queries.shape[0]
        start = Partial(
            jnp.zeros((rows, shape.padded_dim), jnp.float32),
            jnp.full((rows,), MASKED, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )
    return lax.fori_loop(0, run.steps(), step, start)


def _scores(
    products: Float32[Array, "R tokens"], attention: AttentionSpec
) -> Float32[Array, "R tokens"]:
    """Scores in units of log2; it is those in natural units that a softcap bends."""
    scale, softcap = attention.scale, attention.softcap
    if softcap is None:
        return products * (scale * LOG2_E)
    # Becomes libdevice's tanh, which is off by a unit or two in the last place.
    return jnp.tanh(products * (scale / softcap)) * (softcap * LOG2_E)


def load_queries(
    q: Any,
    row: Int32[Array, " ..."],
    query_head: Int32[Array, " R"],
    inside: Bool[Array, " R"],
    shape: KernelShape,
) -> Float[Array, "R Dp"]:
    """Query rows in the kernel's dtype: head `query_head` of row `row` of the batch, which `q`
    refers to; zeros where not `inside`."""
    dims = jnp.arange(shape.padded_dim, dtype=jnp.int32)
    row = jnp.broadcast_to(row, query_head.shape)
    mask = inside[:, None] & (dims < shape.head_dim)[None]
    loaded = plt.load(q.at[row[:, None], query_head[:, None], dims[None]], mask=mask, other=0.0)
    return loaded.astype(shape.dtype)
