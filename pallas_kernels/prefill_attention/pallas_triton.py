"""Prefill attention as two Triton kernels, for Ampere and later GPUs.

Chunk-first is the kernel of decoding, with tokens for rows: chunks wholly before the new tokens of
one or several sequences are read once for all those tokens. The second kernel has a program for
each (query tile, KV head) and up to 64 query rows of it: it attends causally to the sequence's own
new chunks, merges the tokens' partials and writes the output. Where chunks are encoded, each token
reads those before its own there, and the tokens of its own exact.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.pallas_triton import chunk_first
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.implementations import exact_dtype
from pallas_kernels.online_softmax import MASKED, Partial
from pallas_kernels.plans import PrefillReads, require_partials, window_index
from pallas_kernels.triton_runs import HeadKVRefs, PackedRun, Run, keys_operand, tiles_of
from pallas_kernels.triton_shape import KernelShape, unsupported
from pallas_kernels.triton_tiles import Hidden, attend, load_queries

__all__ = ["prefill_attention", "unsupported"]


def prefill_attention(
    q: Float[Array, "T Hq D"],
    stored: LayerKV,
    reads: PrefillReads,
    attention: AttentionSpec,
    *,
    interpret: bool = False,
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`."""
    plan, partials = reads.plan, require_partials(reads.plan)
    how = {"dtype": exact_dtype(stored, reads), "interpret": interpret}
    shared = chunk_first(q, stored, plan.items, partials, attention, reads.head_windows, **how)
    shape = _causal_shape(KernelShape.of("prefill_causal", how["dtype"], stored, attention))
    new = None if reads.new is None else (reads.new.keys, reads.new.values)
    tokens = q.shape[0]
    tiles = plan.tile_begin.shape[0]
    parts = pl.cdiv(min(reads.query_tile, tokens) * shape.group, shape.query_tile)
    output = pl.pallas_call(
        partial(_causal_kernel, shape=shape),
        grid=(tiles, stored.kv_heads, parts),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=shape.compiler_params,
        interpret=interpret,
        name="prefill_causal",
    )(
        reads.head_windows,
        plan.hidden,
        jnp.reshape(plan.num_tiles, 1),
        plan.tile_begin,
        plan.tile_count,
        plan.tile_position,
        plan.tile_sequence,
        plan.block_tables,
        plan.own_chunk,
        partials.row_begin,
        partials.slots,
        stored.layer_operand(),
        q,
        keys_operand(stored),
        stored.values,
        new,
        *shared,
    )
    # No program writes padding: tokens that no tile has, behind the others.
    used = jnp.arange(tiles, dtype=jnp.int32) < plan.num_tiles
    packed = jnp.max(jnp.where(used, plan.tile_begin + plan.tile_count, 0))
    is_token = jnp.arange(tokens, dtype=jnp.int32) < packed
    return jnp.where(is_token[:, None, None], output, jnp.zeros((), q.dtype))


def _causal_shape(shape: KernelShape) -> KernelShape:
    """With a smaller tile where the output and a partial of each query row do not fit registers."""
    wide = shape.dtype.itemsize * shape.padded_dim >= 512
    return dataclasses.replace(shape, query_tile=shape.query_tile // 2) if wide else shape


def _causal_kernel(
    head_windows,
    hidden,
    num_tiles,
    tile_begin,
    tile_count,
    tile_position,
    tile_sequence,
    block_tables,
    own_chunk,
    slot_begin,
    slots,
    layer,
    q,
    keys,
    values,
    new,
    shared_output,
    shared_maximum,
    shared_total,
    output,
    *,
    shape: KernelShape,
):
    tile, head, part = (pl.program_id(axis) for axis in range(3))
    group, heads = shape.group, shape.attention.heads
    first_row = part * shape.query_tile

    def attend_part():
        index = first_row + jnp.arange(shape.query_tile, dtype=jnp.int32)
        local, member = index // group, index % group
        inside = local < tile_count[tile]
        token = tile_begin[tile] + local
        queries = load_queries(q, token, heads.first_query_head(head) + member, inside, shape)
        window = window_index(head_windows, head)
        sequence = (*window, tile_sequence[tile])
        own_begin = own_chunk[sequence] * shape.chunk_size
        position = tile_position[tile] + local - own_begin  # counted from the first own chunk
        last = jnp.max(jnp.where(inside, position, 0))
        of_run = of_new = None
        if hidden is not None:
            opens = own_begin + position + 1 - hidden.size[window]
            of_run = Hidden(hidden.begin[sequence], opens - hidden.offset[sequence])

        def in_pool(num_tokens):
            run = Run(block_tables, sequence, own_chunk[sequence], num_tokens)
            return tiles_of(HeadKVRefs(keys, values, layer[0], head), run, shape)

        if new is None:
            state = attend(queries, in_pool(last + 1), shape, last_seen=position, hidden=of_run)
        else:
            size = shape.chunk_size
            chunk_begin = position // size * size  # of the token's own chunk
            before = in_pool(last // size * size)
            state = attend(queries, before, shape, last_seen=chunk_begin - 1, hidden=of_run)
            first = (tile_position[tile] + first_row // group - own_begin) // size * size
            begin = tile_begin[tile] - (tile_position[tile] - own_begin - first)
            exact = shape.exact(shape.num_chunks)
            new_keys, new_values = new
            if hidden is not None:
                at = own_begin + first  # the position of the first packed token that is read
                of_new = Hidden(hidden.sinks[window] - at, opens - at)
            packed = PackedRun(new_keys, new_values, head, begin, last + 1 - first, exact)
            state = attend(
                queries,
                packed,
                exact,
                first_seen=chunk_begin - first,
                last_seen=position - first,
                hidden=of_new,
                start=state,
            )

        begin = plt.load(slot_begin.at[(*window, token)], mask=inside, other=0)
        count = plt.load(slot_begin.at[(*window, token + 1)], mask=inside, other=0) - begin
        dims = jnp.arange(shape.padded_dim, dtype=jnp.int32)

        def merge(entry, state: Partial) -> Partial:
            known = entry < count
            slot = plt.load(slots.at[(*window, begin + entry)], mask=known, other=0)
            place = slot * group + member
            part_maximum = plt.load(shared_maximum.at[head, place], mask=known, other=MASKED)
            part_total = plt.load(shared_total.at[head, place], mask=known, other=0.0)
            part_output = plt.load(
                shared_output.at[head, place[:, None], dims[None]],
                mask=jnp.broadcast_to(known[:, None], (len(index), shape.padded_dim)),
                other=0.0,
            )
            maximum = jnp.maximum(state.maximum, part_maximum)
            keep = jnp.exp2(state.maximum - maximum)
            weight = jnp.exp2(part_maximum - maximum)
            return Partial(
                state.output * keep[:, None] + part_output * weight[:, None],
                maximum,
                state.total * keep + part_total * weight,
            )

        state = lax.fori_loop(0, jnp.max(count), merge, state)
        plt.store(
            output.at[token[:, None], (heads.first_query_head(head) + member)[:, None], dims[None]],
            (state.output / state.total[:, None]).astype(output.dtype),
            mask=inside[:, None] & (dims < shape.head_dim)[None],
        )

    @pl.when((tile < num_tiles[0]) & (first_row < tile_count[tile] * group))
    def _():
        attend_part()
