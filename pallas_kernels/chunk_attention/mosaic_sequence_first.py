"""The sequence-first phase as a Mosaic GPU kernel: one program for each (row, KV head).

The program attends to the row's private chunks with a tile of query rows of which G count; the
tensor cores have nothing better to do while chunks come from memory. Then it merges what the
chunk-first phase left in the row's slots, and writes the output.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_chunk_first import queries_by_head
from pallas_kernels.chunk_attention.mosaic_shape import WARPGROUP_ROWS, TileShape
from pallas_kernels.chunk_attention.mosaic_tiles import (
    Hidden,
    OwnChunk,
    Run,
    attend,
    await_warps,
    load_rows,
    store_rows,
)
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.online_softmax import MASKED, Partial
from pallas_kernels.plans import DecodeReads, require_own, require_partials, window_index

MAX_GROUP = 32
# Rows of the staging tile that no query row of the group needs: maxima and totals go there.
MAXIMUM_ROW, TOTAL_ROW = MAX_GROUP, MAX_GROUP + 1
THREADS = 128
BLOCKS_AT_ONCE = 16  # of partials in registers, while they are merged


class WindowRefs(NamedTuple):
    """`HiddenTokens`, and the lengths that their windows end at."""

    size: Any  # [W]
    sinks: Any  # [W]
    begin: Any  # [W, B]
    offset: Any  # [W, B]
    lengths: Any  # [B]

    @classmethod
    def of(cls, reads: DecodeReads) -> WindowRefs | None:
        hidden = reads.plan.hidden
        if hidden is None:
            return None
        places = hidden.size, hidden.sinks, hidden.begin, hidden.offset
        return cls(*map(jnp.asarray, (*places, reads.lengths)))


class Block(NamedTuple):
    """Partial results of a few query rows: the output spread over the threads, the rest scalars."""

    output: Any  # [R, D]
    maximum: list
    total: list


def sequence_first(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    reads: DecodeReads,
    attention: AttentionSpec,
    shared: Partial,
    *,
    dtype: Any = None,
    stages: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B Hq D"]:
    """Attention to the private chunks, merged with `shared`, in q's dtype.

    shared is what `chunk_first` gives: Partial [Hkv, F], where F > S * G. `dtype` is what is
    multiplied; None for what is stored.
    """
    batch, _, head_dim = q.shape
    kv_heads = stored.kv_heads
    shape = TileShape.of(
        stored,
        attention,
        stored.dtype if dtype is None else dtype,
        stages=stages,
        other_memory=WARPGROUP_ROWS * head_dim * 4,
        interpret=interpret,
    )
    group, plan, partials = shape.group, reads.plan, require_partials(reads.plan)
    # The merge goes over `block_rows` query rows at once, so that each thread has a number.
    block_rows = max(1, THREADS // head_dim)
    padded_group = -(-group // block_rows) * block_rows
    # Slots are loaded several at a time: each is two round trips to memory, and they need not wait
    # for one another.
    slots_at_once = max(1, min(8, BLOCKS_AT_ONCE * block_rows // padded_group))

    def sequence_first_kernel(
        q_ref,
        keys_ref,
        values_ref,
        windows,
        private_chunks,
        lengths_ref,
        covered_tokens,
        hidden: WindowRefs | None,
        layer_ref,
        slot_begin,
        slots,
        shared_output,
        shared_maximum,
        shared_total,
        own: OwnChunk | None,
        out,
        staging,
        buffers,
    ):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        window = window_index(windows, head)
        place = (*window, row)

        def load_queries(tile):
            return load_rows(q_ref.at[head, pl.ds(row * group, WARPGROUP_ROWS)])

        def load_block(first, known):
            rows = [first + i for i in range(block_rows)]
            return Block(
                shared_output[head, pl.ds(first, block_rows)],
                [jnp.where(known, shared_maximum[head, row], MASKED) for row in rows],
                [shared_total[head, row] for row in rows],
            )

        def finish(tile, private: Partial):
            _stage(shape, staging, private)
            state = [_staged_block(staging, i, block_rows) for i in range(0, group, block_rows)]

            begin, end = slot_begin[place], slot_begin[(*window, row + 1)]

            def merge_slots(step, state):
                entries = [begin + step * slots_at_once + i for i in range(slots_at_once)]
                places = [
                    slots[(*window, jnp.minimum(entry, end - 1))] * group for entry in entries
                ]
                loaded = [
                    [
                        load_block(place + i * block_rows, entry < end)
                        for entry, place in zip(entries, places, strict=True)
                    ]
                    for i in range(len(state))
                ]
                return [
                    functools.reduce(_merge, blocks, block)
                    for block, blocks in zip(state, loaded, strict=True)
                ]

            steps = lax.div(end - begin + (slots_at_once - 1), jnp.int32(slots_at_once))
            state = lax.fori_loop(0, steps, merge_slots, state)
            for i, block in enumerate(state):
                inverses = [_inverse(total) for total in block.total]
                result = block.output * _by_row(inverses, block.output.shape)
                out[row, head, pl.ds(i * block_rows, block_rows)] = result.astype(out.dtype)

        hidden_of_run = hidden_of_own = None
        if hidden is not None:
            opens = hidden.lengths[row] - hidden.size[window]
            hidden_of_run = Hidden(hidden.begin[place], opens - hidden.offset[place])
            whole = Hidden(hidden.sinks[window], opens)
            hidden_of_own = whole.behind(lengths_ref[row]) if own is not None else None
        if own is not None:
            slot = jnp.minimum(own.slot[row], own.keys.shape[2] - 1)
            own = own._replace(slot=slot, tokens=own.tokens[row], hidden=hidden_of_own)
        run = Run(
            keys_ref,
            values_ref,
            layer_ref[0],
            head,
            chunk_id=lambda index: private_chunks[(*place, index)],
            tokens=lengths_ref[row] - covered_tokens[place],
            whole_chunks=own is not None,
            own=own,
            hidden=hidden_of_run,
        )
        attend(shape, buffers, run, jnp.int32(1), load_queries, finish)

    lengths, own_chunks = jnp.asarray(reads.pool_lengths(shape.chunk_size)), None
    if shape.codes is not None:
        tails = require_own(reads)
        own_tokens = jnp.asarray(reads.lengths) - lengths
        own_chunks = OwnChunk(tails.keys, tails.values, jnp.asarray(tails.slots), own_tokens)
    run_kernel = shape.kernel(
        sequence_first_kernel,
        jax.ShapeDtypeStruct((batch, kv_heads, padded_group, head_dim), q.dtype),
        (plgpu.SMEM((WARPGROUP_ROWS, head_dim), jnp.float32),),
        {"row": batch, "head": kv_heads},
    )
    out = run_kernel(
        queries_by_head(q, shape, WARPGROUP_ROWS),
        *shape.chunk_operands(stored),
        None if reads.head_windows is None else jnp.asarray(reads.head_windows),
        *(jnp.asarray(x) for x in (plan.private_chunks, lengths, plan.covered_tokens)),
        WindowRefs.of(reads),
        stored.layer_operand(),
        *(jnp.asarray(x) for x in (partials.row_begin, partials.slots)),
        *shared,
        own_chunks,
    )
    return attention.heads.join(out[:, :, :group])


def _stage(shape: TileShape, staging, private: Partial) -> None:
    """Puts a tile's result where any thread can read any row of it."""
    await_warps(shape)  # they may still read what was there
    store_rows(staging, private.output)
    await_warps(shape)  # some rows are written over
    columns = pl.ds(0, WARPGROUP_ROWS)
    store_rows(staging.at[MAXIMUM_ROW, columns], private.maximum)
    store_rows(staging.at[TOTAL_ROW, columns], private.total)
    await_warps(shape)


def _staged_block(staging, first: int, block_rows: int) -> Block:
    rows = range(first, first + block_rows)
    return Block(
        staging[pl.ds(first, block_rows)],
        [staging[MAXIMUM_ROW, row] for row in rows],
        [staging[TOTAL_ROW, row] for row in rows],
    )


def _merge(a: Block, b: Block) -> Block:
    """`online_softmax.merge` in units of log2, row by row."""
    maximum = list(map(jnp.maximum, a.maximum, b.maximum))
    scale_a = [jnp.exp2(x - m) for x, m in zip(a.maximum, maximum, strict=True)]
    scale_b = [jnp.exp2(x - m) for x, m in zip(b.maximum, maximum, strict=True)]
    totals = zip(a.total, scale_a, b.total, scale_b, strict=True)
    shape = a.output.shape
    return Block(
        a.output * _by_row(scale_a, shape) + b.output * _by_row(scale_b, shape),
        maximum,
        [x * scale_x + y * scale_y for x, scale_x, y, scale_y in totals],
    )


def _by_row(scalars: list, shape: tuple[int, int]):
    """A factor for [R, D]: the scalar of each row."""
    if len(scalars) == 1:
        return scalars[0]
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=shape[0] * shape[1] // THREADS)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return jnp.where(row == 0, scalars[0], scalars[1])


def _inverse(total):
    """1 / total, and 0 where there were no tokens at all."""
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
