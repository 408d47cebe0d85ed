"""Two-phase attention as two Triton kernels, for Ampere and later GPUs.

Chunk-first: one program for each (work item, KV head). It multiplies the queries of all the item's
rows with the item's chunks on the tensor cores and leaves float32 partials in the item's slots. The
query tile is chosen by each program for its item, 16 or 64 rows, so small groups waste no work.
Sequence-first: one program for each (row, KV head). It attends to the row's private chunks, and to
its own exact one where those are encoded, merges the row's partials and writes the output.

The words of `pallas_kernels.triton_tiles` are used here.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.implementations import exact_dtype
from pallas_kernels.online_softmax import MASKED, Partial
from pallas_kernels.plans import (
    DecodeReads,
    HostOrDevice,
    PartialSlots,
    WorkItems,
    require_partials,
    window_index,
)
from pallas_kernels.triton_runs import HeadKVRefs, Run, keys_operand, tiles_of
from pallas_kernels.triton_shape import KernelShape, unsupported
from pallas_kernels.triton_tiles import SMALL_TILE, ChoiceRefs, Hidden, attend, load_queries

__all__ = ["chunk_attention", "chunk_first", "sequence_first", "unsupported"]

# Values of partials that a sequence-first program holds at once: 64 registers a thread.
MERGE_VALUES = 8192


def chunk_attention(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    reads: DecodeReads,
    attention: AttentionSpec,
    *,
    interpret: bool = False,
) -> Float[Array, "B Hq D"]:
    """See `pallas_kernels.chunk_attention.api.chunk_attention`."""
    items, partials = reads.plan.items, require_partials(reads.plan)
    how = {"dtype": exact_dtype(stored, reads), "interpret": interpret}
    shared = chunk_first(q, stored, items, partials, attention, reads.head_windows, **how)
    return sequence_first(q, stored, reads, attention, shared, **how)


def chunk_first(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    items: WorkItems,
    partials: PartialSlots,
    attention: AttentionSpec,
    head_windows: Int32[HostOrDevice, " Hkv"] | None = None,
    *,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Partial:
    """The partials of all work items: output [Hkv, S * G, Dp], maximum and total [Hkv, S * G].

    The query rows of an item are consecutive, from its slot times G on. D is padded to a power of
    two, Dp. What no item owns is left as it was in memory. `dtype` is what is multiplied; None for
    what is stored. With windows, each KV head has the items of its own.
    """
    shape = KernelShape.of("chunk_first", dtype, stored, attention)
    kv_heads = stored.kv_heads
    rows = partials.slots.shape[-1] * shape.group
    return Partial(
        *pl.pallas_call(
            partial(_chunk_first_kernel, shape=shape),
            grid=(items.row_begin.shape[-1], kv_heads),
            out_shape=(
                jax.ShapeDtypeStruct((kv_heads, rows, shape.padded_dim), jnp.float32),
                jax.ShapeDtypeStruct((kv_heads, rows), jnp.float32),
                jax.ShapeDtypeStruct((kv_heads, rows), jnp.float32),
            ),
            compiler_params=shape.compiler_params,
            interpret=interpret,
            name="chunk_first",
        )(
            head_windows,
            choices_operand(items),
            jnp.reshape(items.count, -1),
            items.row_begin,
            items.row_count,
            items.chunk_begin,
            items.chunk_count,
            items.chunks,
            partials.item_slot,
            stored.layer_operand(),
            q,
            keys_operand(stored),
            stored.values,
        )
    )


def choices_operand(items: WorkItems) -> tuple[Int32[Array, "*W K"], Int8[Array, "*W B P"]] | None:
    """What rows have chosen of items, as kernels take it."""
    chosen = items.chosen
    return None if chosen is None else (chosen.columns, chosen.by_row.astype(jnp.int8))


def _chunk_first_kernel(
    head_windows,
    chosen,
    count,
    row_begin,
    row_count,
    chunk_begin,
    chunk_count,
    chunks,
    item_slot,
    layer,
    q,
    keys,
    values,
    output,
    maximum,
    total,
    *,
    shape: KernelShape,
):
    number, head = pl.program_id(0), pl.program_id(1)
    group, heads = shape.group, shape.attention.heads
    window = window_index(head_windows, head)
    item, last = (*window, number), (window or (0,))

    def attend_tile(tile: int, tile_begin):
        index = tile_begin + jnp.arange(tile, dtype=jnp.int32)
        inside = index < row_count[item] * group
        queries = load_queries(
            q,
            row_begin[item] + index // group,
            heads.first_query_head(head) + index % group,
            inside,
            shape,
        )
        run = Run(chunks, window, chunk_begin[item], chunk_count[item] * shape.chunk_size)
        kv = HeadKVRefs(keys, values, layer[0], head)
        choice = None
        if chosen is not None:
            columns, by_row = chosen
            row = row_begin[item] + index // group
            choice = ChoiceRefs(columns, by_row, window, chunk_begin[item], row, inside)
        result = attend(queries, tiles_of(kv, run, shape), shape, chosen=choice)
        place = item_slot[item] * group + index
        dims = jnp.arange(shape.padded_dim, dtype=jnp.int32)
        plt.store(output.at[head, place[:, None], dims[None]], result.output, mask=inside[:, None])
        plt.store(maximum.at[head, place], result.maximum, mask=inside)
        plt.store(total.at[head, place], result.total, mask=inside)

    @pl.when(number < count[last])
    def _():
        query_rows = row_count[item] * group

        @pl.when(query_rows <= SMALL_TILE)
        def _():
            attend_tile(SMALL_TILE, 0)

        @pl.when(query_rows > SMALL_TILE)
        def _():
            @pl.loop(0, pl.cdiv(query_rows, shape.query_tile))
            def _(tile):
                attend_tile(shape.query_tile, tile * shape.query_tile)


def sequence_first(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    reads: DecodeReads,
    attention: AttentionSpec,
    shared: Partial,
    *,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Float[Array, "B Hq D"]:
    """Attention to each row's private chunks and its own, merged with its partials."""
    shape = KernelShape.of("sequence_first", dtype, stored, attention)
    plan, partials = reads.plan, require_partials(reads.plan)
    in_pool, own = reads.pool_lengths(shape.chunk_size), None
    if reads.own is not None:
        slots = jnp.asarray(reads.own.slots)
        own = reads.own.keys, reads.own.values, slots, jnp.asarray(reads.lengths) - in_pool
    return pl.pallas_call(
        partial(_sequence_first_kernel, shape=shape),
        grid=(q.shape[0], stored.kv_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=shape.compiler_params,
        interpret=interpret,
        name="sequence_first",
    )(
        reads.head_windows,
        jnp.asarray(reads.lengths),
        jnp.broadcast_to(jnp.asarray(in_pool), plan.covered_tokens.shape) - plan.covered_tokens,
        plan.hidden,
        plan.private_chunks,
        partials.row_begin,
        partials.slots,
        stored.layer_operand(),
        q,
        keys_operand(stored),
        stored.values,
        own,
        *shared,
    )


def _sequence_first_kernel(
    head_windows,
    lengths,
    private_tokens,
    hidden,
    private_chunks,
    slot_begin,
    slots,
    layer,
    q,
    keys,
    values,
    own,
    shared_output,
    shared_maximum,
    shared_total,
    output,
    *,
    shape: KernelShape,
):
    row, head = pl.program_id(0), pl.program_id(1)
    group, heads = shape.group, shape.attention.heads
    padded_group = pl.next_power_of_2(group)
    tile = max(SMALL_TILE, padded_group)
    index = jnp.arange(tile, dtype=jnp.int32)
    queries = load_queries(q, row, heads.first_query_head(head) + index, index < group, shape)
    window = window_index(head_windows, head)
    place = (*window, row)
    run = Run(private_chunks, place, 0, private_tokens[place])
    tiles = tiles_of(HeadKVRefs(keys, values, layer[0], head), run, shape)
    of_run = of_own = None
    if hidden is not None:
        opens = lengths[row] - hidden.size[window]
        of_run = Hidden(hidden.begin[place], jnp.full(tile, opens - hidden.offset[place]))
    private = attend(queries, tiles, shape, hidden=of_run)
    if own is not None:
        own_keys, own_values, own_slots, own_tokens = own
        exact = shape.exact(own_keys.shape[2])
        run = Run(own_slots, (), row, own_tokens[row])
        kv = HeadKVRefs(own_keys, own_values, layer[0], head)
        if hidden is not None:
            begin = lengths[row] - own_tokens[row]  # of the chunk
            of_own = Hidden(hidden.sinks[window] - begin, jnp.full(tile, opens - begin))
        private = attend(queries, tiles_of(kv, run, exact), exact, hidden=of_own, start=private)

    # Query rows of the tile beyond the group are padding: keep [G, D] of [tile, D].
    fold = (tile // padded_group, padded_group)
    real = (index < padded_group).reshape(fold)
    state = Partial(
        jnp.where(real[:, :, None], private.output.reshape(*fold, shape.padded_dim), 0.0).sum(
            axis=0
        ),
        jnp.where(real, private.maximum.reshape(fold), MASKED).max(axis=0),
        jnp.where(real, private.total.reshape(fold), 0.0).sum(axis=0),
    )
    begin, end = slot_begin[place], slot_begin[(*window, row + 1)]
    at_once = max(1, MERGE_VALUES // (padded_group * shape.padded_dim))
    members = jnp.arange(padded_group, dtype=jnp.int32)
    dims = jnp.arange(shape.padded_dim, dtype=jnp.int32)

    def merge(step, state: Partial) -> Partial:
        entry = begin + step * at_once + jnp.arange(at_once, dtype=jnp.int32)
        slot = plt.load(slots.at[(*window, entry)], mask=entry < end, other=0)
        place = slot[:, None] * group + members[None]
        known = (entry < end)[:, None] & (members < group)[None]
        part_maximum = plt.load(shared_maximum.at[head, place], mask=known, other=MASKED)
        part_total = plt.load(shared_total.at[head, place], mask=known, other=0.0)
        part_output = plt.load(
            shared_output.at[head, place[:, :, None], dims[None, None]],
            mask=jnp.broadcast_to(known[:, :, None], (*known.shape, shape.padded_dim)),
            other=0.0,
        )
        new_maximum = jnp.maximum(state.maximum, part_maximum.max(axis=0))
        keep = jnp.exp2(state.maximum - new_maximum)
        weight = jnp.exp2(part_maximum - new_maximum[None])
        return Partial(
            state.output * keep[:, None] + (part_output * weight[:, :, None]).sum(axis=0),
            new_maximum,
            state.total * keep + (part_total * weight).sum(axis=0),
        )

    state = lax.fori_loop(0, pl.cdiv(end - begin, at_once), merge, state)
    result = state.output / jnp.where(state.total > 0, state.total, 1.0)[:, None]
    plt.store(
        output.at[row, (heads.first_query_head(head) + members)[:, None], dims[None]],
        result.astype(output.dtype),
        mask=(members < group)[:, None] & (dims < shape.head_dim)[None],
    )
