"""Attention of tiles of queries over a run of chunks, inside a Mosaic GPU kernel (Hopper).

The run is read in steps of `key_tile` tokens. A ring of buffers in shared memory is filled by TMA,
`stages - 1` steps ahead of the step that is being multiplied. Each warpgroup has 64 query rows, and
their scores, weights and output in its registers (online softmax, arXiv 1805.02867): in float32,
and in units of log2, because the GPU computes powers of two. Warpgroups of a program share the
ring; the first one fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_attention.mosaic_codes import Place
from pallas_kernels.chunk_attention.mosaic_shape import (
    LOG2_E,
    WARPGROUP_AXIS,
    WARPGROUP_ROWS,
    Buffers,
    TileShape,
)
from pallas_kernels.online_softmax import MASKED, Partial

MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
ACCUMULATOR = plgpu.WGMMAAccumulatorRef


class Hidden(NamedTuple):
    """Tokens that a window hides: from `begin` up to `end`."""

    begin: Any
    end: Any

    def behind(self, tokens) -> Hidden:
        """The same, counted from behind so many tokens."""
        return Hidden(self.begin - tokens, self.end - tokens)


class OwnChunk(NamedTuple):
    """The chunk that a row's last token lies in, exact, where those before it are encoded."""

    keys: Any  # the reference [L, Hkv, S, C, D]
    values: Any
    slot: Any  # of the row, that exists
    tokens: Any  # the first so many of it
    hidden: Hidden | None = None  # of these


class Run(NamedTuple):
    """What a program's queries attend to."""

    keys: Any  # the pool's reference [L, Hkv, N, C, D], or those of encoded chunks
    values: Any
    layer: Any
    head: Any
    chunk_id: Callable  # index in the run -> id in the pool, of a chunk that exists
    tokens: Any  # the first so many of the run
    whole_chunks: bool  # static: tokens is a multiple of C
    own: OwnChunk | None = None  # attended to before the run
    hidden: Hidden | None = None  # of the run's tokens
    shift: Callable | None = None  # tile, chunk of the run -> see `Seen`


class Seen(NamedTuple):
    """Which tokens of a step count: the first so many, or all for None, less those hidden; and of
    whole steps those whose `shift` [64] is 0 for a row, not `MASKED`."""

    first: Any
    hidden: Hidden | None
    shift: Any = None


def attend(
    shape: TileShape,
    buffers: Buffers,
    run: Run,
    tiles,
    load_queries: Callable,
    store: Callable,
) -> None:
    """Attends to the run with one tile of queries after another.

    load_queries(tile) gives the calling warpgroup's queries [64, D] of the tile; store(tile,
    partial) gets their Partial [64]. Without tokens that is the empty one.
    """
    warpgroup = lax.axis_index(WARPGROUP_AXIS)
    stages = shape.stages
    steps = _ceil_div(run.tokens, shape.key_tile)
    total = tiles * steps
    fetch = partial(_fetch, shape, buffers, run, warpgroup, steps, total)
    chunk_ids = partial(_chunk_ids, shape, run, steps)

    if run.own is not None:
        _fetch_own(shape, buffers, run, run.own, jnp.int32(0))
    for ahead in range(stages - 1):
        fetch(jnp.int32(ahead), chunk_ids(jnp.int32(ahead)))

    def wait_for_readers(position):
        if shape.warpgroups > 1:

            @pl.when((warpgroup == 0) & (position > 0))
            def _():
                plgpu.barrier_wait(buffers.read.at[_rem(position - 1, stages)])

    def attend_tile(tile, next_ids):
        buffers.queries[warpgroup] = load_queries(tile)
        plgpu.commit_smem()

        def step(index, carry):
            state, next_ids = carry
            position = tile * steps + index
            wait_for_readers(position)  # of the buffer that this step refills: the previous one's
            fetch(position + (stages - 1), next_ids)
            next_ids = chunk_ids(position + stages)  # read now, so that the next step need not wait
            slot = _slot(shape, position)
            visible = run.tokens - index * shape.key_tile
            if run.whole_chunks and shape.chunks_per_step == 1:
                visible = None
            shift = run.shift
            if shift is not None:
                shift = shift(tile, lax.div(index, jnp.int32(shape.steps_per_chunk)))
            hidden = run.hidden and run.hidden.behind(index * shape.key_tile)
            seen = Seen(visible, hidden, shift)
            keys, values = (
                partial(_await, shape, buffers, run, warpgroup, slot, index, i) for i in range(2)
            )
            state = _attend_step(shape, buffers, warpgroup, keys, values, seen, state)
            if shape.warpgroups > 1:
                plgpu.barrier_arrive(buffers.read.at[slot])
            return state, next_ids

        state = _empty(shape)
        if run.own is not None:
            state = _attend_own(shape, buffers, run, run.own, warpgroup, state)
        state, next_ids = lax.fori_loop(0, steps, step, (state, next_ids))
        store(tile, state)
        return next_ids

    lax.fori_loop(0, tiles, attend_tile, chunk_ids(jnp.int32(stages - 1)))
    wait_for_readers(total)  # every phase of a barrier has someone who waits for it


def _empty(shape: TileShape) -> Partial:
    rows, f32 = (WARPGROUP_ROWS,), jnp.float32
    return Partial(
        plgpu.layout_cast(jnp.full((*rows, shape.head_dim), 0, f32), MATRIX),
        plgpu.layout_cast(jnp.full(rows, MASKED, f32), PER_ROW),
        plgpu.layout_cast(jnp.full(rows, 0, f32), PER_ROW),
    )


def _chunk_ids(shape: TileShape, run: Run, steps, position) -> tuple:
    """Chunks of the step at `position`, counted over all tiles.

    A step that is longer than what is left of the run repeats the last chunk: what a masked weight
    of zero is multiplied with must be a number.
    """
    step = _rem(position, jnp.maximum(steps, 1))
    last = jnp.maximum(_ceil_div(run.tokens, shape.chunk_size) - 1, 0)
    first = lax.div(step * shape.chunks_per_step, jnp.int32(shape.steps_per_chunk))
    ids = (run.chunk_id(jnp.minimum(first + i, last)) for i in range(shape.chunks_per_step))
    return tuple(jnp.clip(chunk, 0, shape.num_chunks - 1) for chunk in ids)


def _slot(shape: TileShape, position):
    """The place in the ring of a step."""
    slot = _rem(position, shape.stages)
    if shape.codes is None:
        return slot
    # An address of each array of a ring follows from it. The compiler would have each of them grow
    # along with the position, in two registers that none is left for.
    return lax.optimization_barrier(slot)


def _fetch(shape: TileShape, buffers: Buffers, run: Run, warpgroup, steps, total, position, ids):
    """Starts the copy of a step's keys and values into its place in the ring."""
    slot = _slot(shape, position)
    step = _rem(position, jnp.maximum(steps, 1))
    tokens = min(shape.chunk_size, shape.key_tile)
    step_of_chunk = _rem(step, shape.steps_per_chunk)
    part = pl.ds(step_of_chunk * tokens, tokens)

    @pl.when((warpgroup == 0) & (position < total))
    def _():
        for pool, ring, copied, codes in zip(
            (run.keys, run.values),
            (buffers.keys, buffers.values),
            (buffers.keys_copied, buffers.values_copied),
            shape.codes or (None, None),
            strict=True,
        ):
            for i, chunk in enumerate(ids):
                barrier = copied.at[slot]
                if codes is not None:
                    place = Place(pool, ring, slot, step_of_chunk)
                    codes.copy(place, run.layer, run.head, chunk, i, barrier)
                    continue
                place = ring.at[slot, pl.ds(i * tokens, tokens)]
                chunk_ref = pool.at[run.layer, run.head, chunk, part]
                plgpu.copy_gmem_to_smem(chunk_ref, place, barrier)


def _fetch_own(shape: TileShape, buffers: Buffers, run: Run, own: OwnChunk, step) -> None:
    """Starts the copy of some tokens of the row's own chunk to where steps are decoded.

    A chunk that is shorter than the tile fills it several times: see `_chunk_ids`.
    """
    tokens = min(shape.chunk_size, shape.key_tile)

    @pl.when(step * tokens < own.tokens)
    def _():
        for pool, tile in zip((own.keys, own.values), buffers.tiles, strict=True):
            source = pool.at[run.layer, run.head, own.slot, pl.ds(step * tokens, tokens)]
            for i in range(shape.chunks_per_step):
                place = tile.at[pl.ds(i * tokens, tokens)]
                plgpu.copy_gmem_to_smem(source, place, buffers.own_copied)


def _attend_own(
    shape: TileShape, buffers: Buffers, run: Run, own: OwnChunk, warpgroup, state: Partial
) -> Partial:
    """Merges the attention over the row's own chunk, whose first copies have started."""
    keys, values = buffers.tiles

    def attend(step, state):
        plgpu.barrier_wait(buffers.own_copied)
        begin = step * shape.key_tile
        seen = Seen(own.tokens - begin, own.hidden and own.hidden.behind(begin))
        state = _attend_step(shape, buffers, warpgroup, lambda: keys, lambda: values, seen, state)
        await_warps(shape)  # before the tiles are written again
        _fetch_own(shape, buffers, run, own, step + 1)
        return state

    return lax.fori_loop(0, _ceil_div(own.tokens, shape.key_tile), attend, state)


def _await(shape: TileShape, buffers: Buffers, run: Run, warpgroup, slot, index, which: int) -> Any:
    """Keys (0) or values (1) of a step, when they are in shared memory: [key_tile, D]."""
    plgpu.barrier_wait((buffers.keys_copied, buffers.values_copied)[which].at[slot])
    ring = (buffers.keys, buffers.values)[which]
    if shape.codes is None:
        return ring.at[slot]
    codes, tile = shape.codes[which], buffers.tiles[which]
    place = Place((run.keys, run.values)[which], ring, slot, _rem(index, shape.steps_per_chunk))
    for chunk in range(shape.chunks_per_step):
        codes.decode(place, chunk, tile, warpgroup, shape.warpgroups)
    # The warps' only barrier of a step, there is one for keys and one for values. What a step reads
    # before the one for values is free behind it: queries, the keys' tile, the ring's slot. The
    # values' tile is, behind the one for the next keys.
    plgpu.commit_smem()
    if shape.warpgroups > 1:
        plgpu.barrier_arrive(buffers.decoded.at[which])
        plgpu.barrier_wait(buffers.decoded.at[which])
    return tile


def _attend_step(
    shape: TileShape,
    buffers: Buffers,
    warpgroup,
    keys: Callable,
    values: Callable,
    seen: Seen,
    state: Partial,
) -> Partial:
    """Merges the attention over one step's tokens into the state. keys() and values() wait for
    them: [key_tile, D]."""
    rows, tokens = WARPGROUP_ROWS, shape.key_tile
    step_keys = keys()

    def score(accumulator):
        plgpu.wgmma(accumulator, buffers.queries.at[warpgroup], _transpose(step_keys))
        return accumulator[...]

    scores = _scores(shape, pl.run_scoped(score, ACCUMULATOR((rows, tokens), jnp.float32)))
    if seen.first is not None or seen.hidden is not None:
        token = plgpu.broadcasted_iota(jnp.int32, (rows, tokens), 1, layout=MATRIX)
        if seen.first is not None:
            scores = jnp.where(token < seen.first, scores, MASKED)
        if seen.hidden is not None:
            begin, end = seen.hidden
            scores = jnp.where((token < begin) | (token >= end), scores, MASKED)
    if seen.shift is not None:
        scores = scores + lax.broadcast_in_dim(seen.shift, scores.shape, [0])
    maximum = jnp.maximum(state.maximum, scores.max(axis=1))
    if seen.shift is not None:  # above what is masked, so that weights are 0 where all is
        maximum = jnp.maximum(maximum, MASKED / 2)
    rescale = jnp.exp2(state.maximum - maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(maximum, scores.shape, [0]))
    total = state.total * rescale + weights.sum(axis=1)
    output = state.output * lax.broadcast_in_dim(rescale, state.output.shape, [0])
    weights = weights.astype(shape.dtype)
    output = _accumulate(shape, buffers, warpgroup, output, weights, values())
    return Partial(output, maximum, total)


def _scores(shape: TileShape, products) -> Any:
    """Scores in units of log2; it is those in natural units that a softcap bends."""
    softcap = shape.attention.softcap
    if softcap is None:
        return products * shape.scale
    # tanh(x) = 1 - 2 / (1 + exp(2 x)). With approximate math jnp.tanh is the GPU's own instruction,
    # off by up to one part in 2000: a score near a softcap of 50, by 0.02. This is off by less than
    # 1e-6 of the softcap, for every x. Near 0 that is much of tanh(x), but softmax knows only
    # differences of scores.
    exponentials = jnp.exp2(products * (2 * shape.scale / softcap))
    limit = softcap * LOG2_E
    return limit - 2 * limit / (1 + exponentials)


def _accumulate(shape: TileShape, buffers: Buffers, warpgroup, output, weights, values) -> Any:
    """output + weights @ values; the weights are an operand in registers."""
    if not shape.interpret:

        def add(accumulator):
            plgpu.wgmma(accumulator, weights, values)

        return pl.run_state(add)(ACCUMULATOR.init(output))

    # The interpreter knows neither operands in registers nor accumulators with a first value.
    buffers.weights[warpgroup] = weights
    plgpu.commit_smem()

    def multiply(accumulator):
        plgpu.wgmma(accumulator, buffers.weights.at[warpgroup], values)
        return accumulator[...]

    return output + pl.run_scoped(multiply, ACCUMULATOR(output.shape, jnp.float32))


def await_warps(shape: TileShape) -> None:
    """Lets a warpgroup's warps wait for one another, where the lowering does not at each access."""
    if shape.codes is not None:
        plgpu.commit_smem()


def load_rows(reference):
    """A matrix in global memory, as registers. Rows may begin anywhere, unlike those of a TMA."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(reference, *index, layout=MATRIX, optimized=False)


def load_vector(reference):
    """A number for each row, from global memory."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(reference, *index, layout=PER_ROW, optimized=False)


def store_rows(reference, value) -> None:
    """Writes registers to global memory, with no demand on how the layout fits its sectors."""
    store = getattr(plgpu, "store", None)
    if store is not None:
        store(reference, value, optimized=False)
    else:  # jax 0.11 and before demand nothing
        reference[...] = value


def _transpose(reference):
    if jax.__version_info__ < (0, 11):
        return plgpu.transpose_ref(reference, (1, 0))
    return reference.transpose((1, 0))


def _ceil_div(a, b: int):
    return lax.div(a + (b - 1), jnp.int32(b))


def _rem(a, b):
    return lax.rem(a, jnp.int32(b))
