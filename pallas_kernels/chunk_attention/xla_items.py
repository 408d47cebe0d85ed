"""The chunk-first phase in plain JAX, laid out for CPUs: every work item gathers its chunks once
and multiplies them with the queries of all its rows.

Pieces of a run have a few exact sizes (a power of four of chunks), so that no score needs masking:
on 2 cores, masking costs a third of the phase. Loops run as often as the plan needs, not as its
padding allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import HeadKV
from pallas_kernels.online_softmax import MASKED, Partial, empty, merge
from pallas_kernels.plans import HostOrDevice, WorkItems

# Tokens gathered at once. Larger pieces amortise the cost of a loop step; the scores of a piece
# (tokens x query rows, float32) should stay within a few MB.
MAX_PIECE_TOKENS = 4096
MAX_PIECE_SCORES = 1 << 20

State = TypeVar("State")


@dataclass(frozen=True)
class Run:
    """The chunks `chunks[begin : begin + count]`, all of them full."""

    chunks: Int32[HostOrDevice, " K"]
    begin: Int32[HostOrDevice, ""]
    count: Int32[HostOrDevice, ""]


def chunk_first(
    queries: Float32[Array, "B G D"], kv: HeadKV, items: WorkItems, attention: AttentionSpec
) -> Partial:
    """All work items of one KV head, merged into the rows they cover: Partial [B, G]."""

    def attend(some: Float32[Array, "tile G D"], run: Run) -> Partial:
        return attend_run(some.reshape(-1, some.shape[-1]), kv, run, attention)

    return merge_items(attend, queries, items)


def merge_items(
    attend: Callable[[Float32[Array, "tile H D"], Run], Partial],
    queries: Float32[Array, "B H D"],
    items: WorkItems,
) -> Partial:
    """What `attend` finds of every item, for a tile with its rows, merged into those: Partial
    [B, H]. It gives Partial [tile * H]."""
    batch, heads, head_dim = queries.shape
    tiles = row_tiles(batch)

    def attend_item(tile, item, state: Partial) -> Partial:
        first, rows = items.row_begin[item], items.row_count[item]
        start = jnp.minimum(first, batch - tile)
        result = attend(
            lax.dynamic_slice_in_dim(queries, start, tile),
            Run(items.chunks, items.chunk_begin[item], items.chunk_count[item]),
        )
        row = start + jnp.arange(tile, dtype=jnp.int32)
        covered = ((row >= first) & (row < first + rows))[:, None]
        return merge_rows(state, result, start, covered)

    def step(item, state: Partial) -> Partial:
        larger = items.row_count[item] > jnp.asarray(tiles, jnp.int32)
        tile = larger.sum(dtype=jnp.int32)
        branches = [partial(attend_item, size) for size in tiles]
        return lax.switch(tile, branches, item, state)

    return lax.fori_loop(0, items.count, step, empty((batch, heads), head_dim))


def merge_rows(
    state: Partial, result: Partial, start: Int32[Array, ""], covered: Bool[Array, "tile 1"]
) -> Partial:
    """Merges a tile's result into the rows from `start` on, where `covered` says so.

    state is Partial [B, H], result Partial [tile * H].
    """
    tile, heads = len(covered), state.total.shape[1]
    result = Partial(*(x.reshape(tile, heads, *x.shape[1:]) for x in result))
    result = Partial(
        jnp.where(covered[..., None], result.output, 0),
        jnp.where(covered, result.maximum, MASKED),
        jnp.where(covered, result.total, 0),
    )
    old = Partial(*(lax.dynamic_slice_in_dim(x, start, tile) for x in state))
    new = zip(state, merge(old, result), strict=True)
    return Partial(*(lax.dynamic_update_slice_in_dim(x, part, start, 0) for x, part in new))


def attend_run(
    queries: Float32[Array, "R D"], kv: HeadKV, run: Run, attention: AttentionSpec
) -> Partial:
    """Attention over the chunks of a run: Partial [R]."""
    rows, head_dim = queries.shape

    def attend_piece(ids: Int32[Array, " size"], state: Partial) -> Partial:
        return merge(state, attend_tokens(queries, *kv.gather(ids), attention))

    return for_each_piece(run, rows, kv.stored.chunk_size, attend_piece, empty((rows,), head_dim))


def for_each_piece(
    run: Run,
    rows: int,
    chunk_size: int,
    step: Callable[[Int32[Array, " size"], State], State],
    state: State,
) -> State:
    """`step(chunk ids, state)` for each piece of a run that so many query rows attend to."""
    chunks, begin, count = run.chunks, run.begin, run.count
    for size in _piece_sizes(chunk_size, rows, chunks.shape[0]):
        pieces = lax.div(count, jnp.int32(size))

        def take_piece(piece, state, size=size, begin=begin):
            return step(lax.dynamic_slice(chunks, (begin + piece * size,), (size,)), state)

        state = lax.fori_loop(0, pieces, take_piece, state)
        begin = begin + pieces * size
        count = count - pieces * size
    return state


def attend_tokens(
    queries: Float32[Array, "R D"],
    k: Float32[Array, "T D"],
    v: Float32[Array, "T D"],
    attention: AttentionSpec,
    visible: Bool[Array, "T R"] | None = None,
) -> Partial:
    """Attention over the tokens that each query sees, or all: Partial [R]."""
    weights, maximum = weigh(queries, k, attention, visible)
    return Partial(dot(weights, v, ((0,), (0,))), maximum, weights.sum(axis=0))


def weigh(
    queries: Float32[Array, "R D"],
    k: Float32[Array, "T D"],
    attention: AttentionSpec,
    visible: Bool[Array, "T R"] | None = None,
) -> tuple[Float32[Array, "T R"], Float32[Array, " R"]]:
    """Exponentials of the scores less their maximum, and that."""
    # [T, R]: the long dimension first is faster on CPU.
    scores = attention.cap(dot(k, queries, ((1,), (1,))))
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    maximum = scores.max(axis=0)
    weights = jnp.exp(scores - maximum[None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    return weights, maximum


def dot(a: Float32[Array, " ..."], b: Float32[Array, " ..."], contract) -> Float32[Array, " ..."]:
    """Matrix product in full float32, also where the default is TensorFloat-32."""
    return lax.dot_general(a, b, (contract, ((), ())), precision=lax.Precision.HIGHEST)


def _piece_sizes(chunk_size: int, rows: int, longest: int) -> list[int]:
    """Chunks per piece, largest first, down to 1 by factors of 4.

    Shorter than the `longest` run: a slice as long as its array has one place to begin, so XLA
    would take the whole piece out of the loop and compute it even when no run needs it.
    """
    most = min(longest - 1, min(MAX_PIECE_TOKENS, MAX_PIECE_SCORES // rows) // chunk_size)
    size = 1
    while size * 4 <= most:
        size *= 4
    sizes = [size]
    while size > 1:
        size //= 4
        sizes.append(size)
    return sizes


def row_tiles(batch: int) -> list[int]:
    """Row counts an item is padded to: the batch, and eighths of it down to 4.

    Few, because each adds a copy of the phase to the program, and padding is cheap on CPU: a chunk
    for 32 rows costs 1.5 times a chunk for 4.
    """
    tiles = [batch]
    while tiles[0] >= 32:
        tiles.insert(0, tiles[0] // 8)
    return tiles
