"""Two-phase attention in plain JAX, laid out for CPUs: one KV head at a time, so that the chunks
gathered for a head stay in cache, and each run of chunks multiplied as one matrix product.

Chunk-first: every work item gathers its chunks once and multiplies them with the queries of all
its rows. Pieces of a run have a few exact sizes (a power of four of chunks), so that no score needs
masking: on 2 cores, masking costs a third of the phase. Sequence-first: all rows at once, over
their private chunks, masked by length. Both loops run as often as the plan needs, not as its
padding allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.xla_tiles import attend_tiles
from pallas_kernels.coded_kv import HeadKV, LayerKV
from pallas_kernels.online_softmax import MASKED, Partial, empty, merge, normalise
from pallas_kernels.plans import DecodeReads, HostOrDevice, WorkItems

# Tokens gathered at once. Larger pieces amortise the cost of a loop step; the scores of a piece
# (tokens x query rows, float32) should stay within a few MB.
MAX_PIECE_TOKENS = 4096
MAX_PIECE_SCORES = 1 << 20
# Chunks of all rows gathered by one step of the sequence-first loop.
SEQUENCE_STEP_CHUNKS = 32


@dataclass(frozen=True)
class Run:
    """The chunks `chunks[begin : begin + count]`, all of them full."""

    chunks: Int32[HostOrDevice, " K"]
    begin: Int32[HostOrDevice, ""]
    count: Int32[HostOrDevice, ""]


def chunk_attention(
    q: Float[Array, "B Hq D"], stored: LayerKV, reads: DecodeReads, attention: AttentionSpec
) -> Float[Array, "B Hq D"]:
    """See `pallas_kernels.chunk_attention.api.chunk_attention`."""

    def attend_head(kv: HeadKV, queries: Float32[Array, "B G D"]) -> Float32[Array, "B G D"]:
        of_head = reads.by_head(kv.head)
        shared = chunk_first(queries, kv, of_head.plan.items, attention)
        private = _sequence_first(queries, kv, of_head, attention)
        state = merge(shared, private)
        if of_head.plan.tiles is not None:
            state = merge(state, attend_tiles(queries, kv, of_head.plan.tiles, attention))
        return normalise(state)

    return map_heads(attend_head, q, stored, attention)


def map_heads(
    attend_head: Callable[[HeadKV, Float32[Array, "B G D"]], Float32[Array, "B G D"]],
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    attention: AttentionSpec,
) -> Float[Array, "B Hq D"]:
    """The output of every KV head, one after another; the queries are scaled and in float32."""
    queries = attention.heads.split(q.astype(jnp.float32) * attention.scale)
    queries = queries.transpose(1, 0, 2, 3)
    heads = jnp.arange(stored.kv_heads, dtype=jnp.int32)
    output = lax.map(lambda head: attend_head(HeadKV(stored, head), queries[head]), heads)
    return attention.heads.join(output.transpose(1, 0, 2, 3)).astype(q.dtype)


def chunk_first(
    queries: Float32[Array, "B G D"], kv: HeadKV, items: WorkItems, attention: AttentionSpec
) -> Partial:
    """All work items, merged into the rows they cover: Partial [B, G]."""
    batch, group, head_dim = queries.shape
    tiles = row_tiles(batch)

    def attend_item(tile, item, state: Partial) -> Partial:
        first, rows = items.row_begin[item], items.row_count[item]
        start = jnp.minimum(first, batch - tile)
        result = attend_run(
            lax.dynamic_slice_in_dim(queries, start, tile).reshape(tile * group, head_dim),
            kv,
            Run(items.chunks, items.chunk_begin[item], items.chunk_count[item]),
            attention,
        )
        row = start + jnp.arange(tile, dtype=jnp.int32)
        covered = ((row >= first) & (row < first + rows))[:, None]
        return merge_rows(state, result, start, covered)

    def step(item, state: Partial) -> Partial:
        larger = items.row_count[item] > jnp.asarray(tiles, jnp.int32)
        tile = larger.sum(dtype=jnp.int32)
        branches = [partial(attend_item, size) for size in tiles]
        return lax.switch(tile, branches, item, state)

    return lax.fori_loop(0, items.count, step, empty((batch, group), head_dim))


def merge_rows(
    state: Partial, result: Partial, start: Int32[Array, ""], covered: Bool[Array, "tile 1"]
) -> Partial:
    """Merges a tile's result into the rows from `start` on, where `covered` says so.

    state is Partial [B, G], result Partial [tile * G].
    """
    tile, group = len(covered), state.total.shape[1]
    result = Partial(*(x.reshape(tile, group, *x.shape[1:]) for x in result))
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
    chunks, begin, count = run.chunks, run.begin, run.count
    state = empty((rows,), head_dim)
    for size in _piece_sizes(kv.stored.chunk_size, rows, chunks.shape[0]):
        pieces = lax.div(count, jnp.int32(size))

        def attend_piece(piece, state, size=size, begin=begin):
            ids = lax.dynamic_slice(chunks, (begin + piece * size,), (size,))
            return merge(state, attend_tokens(queries, *kv.gather(ids), attention))

        state = lax.fori_loop(0, pieces, attend_piece, state)
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
    # [T, R]: the long dimension first is faster on CPU.
    scores = attention.cap(_dot(k, queries, ((1,), (1,))))
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    maximum = scores.max(axis=0)
    weights = jnp.exp(scores - maximum[None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    return Partial(_dot(weights, v, ((0,), (0,))), maximum, weights.sum(axis=0))


def _dot(a: Float32[Array, " ..."], b: Float32[Array, " ..."], contract) -> Float32[Array, " ..."]:
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


def _sequence_first(
    queries: Float32[Array, "B G D"], kv: HeadKV, reads: DecodeReads, attention: AttentionSpec
) -> Partial:
    """The private chunks of every row, its own among them wherever it is: Partial [B, G]."""
    batch, group, head_dim = queries.shape
    plan, num_chunks, chunk_size = reads.plan, kv.stored.num_chunks, kv.stored.chunk_size
    width = plan.private_chunks.shape[1]
    step_chunks = min(width, max(1, SEQUENCE_STEP_CHUNKS // batch))
    step_tokens = step_chunks * chunk_size
    padding = ((0, 0), (0, -width % step_chunks))
    private = jnp.pad(jnp.minimum(plan.private_chunks, num_chunks - 1), padding)
    remaining = reads.pool_lengths(chunk_size) - plan.covered_tokens

    def step(index, state: Partial) -> Partial:
        ids = lax.dynamic_slice_in_dim(private, index * step_chunks, step_chunks, axis=1)
        k, v = kv.gather(ids)
        place = index * step_tokens + jnp.arange(step_tokens, dtype=jnp.int32)
        visible = reads.sees(place, remaining)
        return merge(state, _attend_rows(queries, k, v, attention, visible))

    steps = lax.div(jnp.max(remaining) + (step_tokens - 1), jnp.int32(step_tokens))
    start = empty((batch, group), head_dim)
    if reads.own is not None:
        own = reads.own
        k, v = (
            chunks.at[kv.stored.layer, kv.head, own.slots].get(mode="clip").astype(jnp.float32)
            for chunks in (own.keys, own.values)
        )
        start = _attend_rows(queries, k, v, attention, reads.sees_own(chunk_size))
    return lax.fori_loop(0, steps, step, start)


def _attend_rows(
    queries: Float32[Array, "B G D"],
    k: Float32[Array, "B T D"],
    v: Float32[Array, "B T D"],
    attention: AttentionSpec,
    visible: Bool[Array, "B T"],
) -> Partial:
    """Each row over tokens of its own, those that it sees: Partial [B, G]."""
    visible = visible[:, None]
    scores = jnp.einsum("bgd,btd->bgt", queries, k, precision=lax.Precision.HIGHEST)
    scores = jnp.where(visible, attention.cap(scores), MASKED)
    maximum = scores.max(axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0)
    output = jnp.einsum("bgt,btd->bgd", weights, v, precision=lax.Precision.HIGHEST)
    return Partial(output, maximum, weights.sum(axis=-1))
