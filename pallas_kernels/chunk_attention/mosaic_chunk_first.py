"""The chunk-first phase as a Mosaic GPU kernel: one program for each (work item, KV head).

A *query row* is one query head of one row of the batch: an item with R rows has R * G of them for
each KV head. The program attends to the item's chunks with one tile of them after another (the
planner makes items of one tile) and leaves float32 partials in the item's slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_shape import (
    WARPGROUP_AXIS,
    WARPGROUP_ROWS,
    TileShape,
)
from pallas_kernels.chunk_attention.mosaic_tiles import (
    Run,
    attend,
    load_rows,
    load_vector,
    store_rows,
)
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.online_softmax import MASKED, Partial
from pallas_kernels.plans import HostOrDevice, PartialSlots, WorkItems, window_index


def chunk_first(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    items: WorkItems,
    partials: PartialSlots,
    attention: AttentionSpec,
    head_windows: Int32[HostOrDevice, " Hkv"] | None = None,
    *,
    dtype: Any = None,
    query_tile: int = WARPGROUP_ROWS,
    stages: int | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention over every work item: Partial [Hkv, F], where F >= S * G and slot s has query rows
    [s * G, (s + 1) * G). Maxima are in units of log2. Rows of slots that no item has are undefined.

    query_tile is 64, or 128: two warpgroups that share what they read. Slots must be reserved for
    whole warpgroups, see `PartialSlots`. `dtype` is what is multiplied; None for what is stored.
    With windows, each KV head has the items of its own. Rows that have chosen chunks need those of
    64 tokens or more.
    """
    shape = TileShape.of(
        stored,
        attention,
        stored.dtype if dtype is None else dtype,
        query_tile=query_tile,
        stages=stages,
        interpret=interpret,
    )
    kv_heads, group = stored.kv_heads, shape.group
    # Room for the last item's last warpgroup, whatever its slots' place is.
    slot_rows = (-(-partials.slots.shape[-1] * group // WARPGROUP_ROWS) + 1) * WARPGROUP_ROWS

    def chunk_first_kernel(
        q_ref,
        keys_ref,
        values_ref,
        windows,
        row_begin,
        row_count,
        chunk_begin,
        chunk_count,
        chunks,
        count,
        item_slot,
        layer_ref,
        columns,
        shifts,
        output,
        maximum,
        total,
        buffers,
    ):
        number, head = lax.axis_index("item"), lax.axis_index("head")
        window = window_index(windows, head)
        item = (*window, number)

        @pl.when(number < count[window or 0])
        def _():
            first_row, rows = row_begin[item] * group, row_count[item] * group
            first_slot = item_slot[item] * group
            first_chunk = chunk_begin[item]
            begin = lax.axis_index(WARPGROUP_AXIS) * WARPGROUP_ROWS

            def load_queries(tile):
                row = first_row + tile * shape.query_tile + begin
                return load_rows(q_ref.at[head, pl.ds(row, WARPGROUP_ROWS)])

            def store(tile, partial: Partial):
                row = tile * shape.query_tile + begin

                @pl.when(row < rows)
                def _():
                    place = pl.ds(first_slot + row, WARPGROUP_ROWS)
                    store_rows(output.at[head, place], partial.output)
                    store_rows(maximum.at[head, place], partial.maximum)
                    store_rows(total.at[head, place], partial.total)

            def shift(tile, chunk):
                column = columns[(*window, first_chunk + chunk)]
                row = first_row + tile * shape.query_tile + begin
                return load_vector(shifts.at[(*window, column, pl.ds(row, WARPGROUP_ROWS))])

            run = Run(
                keys_ref,
                values_ref,
                layer_ref[0],
                head,
                chunk_id=lambda index: chunks[(*window, first_chunk + index)],
                tokens=chunk_count[item] * shape.chunk_size,
                whole_chunks=True,
                shift=None if columns is None else shift,
            )
            tiles = lax.div(rows + (shape.query_tile - 1), jnp.int32(shape.query_tile))
            attend(shape, buffers, run, tiles, load_queries, store)

    vector = jax.ShapeDtypeStruct((kv_heads, slot_rows), jnp.float32)
    matrix = jax.ShapeDtypeStruct((*vector.shape, shape.head_dim), jnp.float32)
    run_kernel = shape.kernel(
        chunk_first_kernel,
        (matrix, vector, vector),
        (),
        {"item": items.row_begin.shape[-1], "head": kv_heads},
    )
    output, maximum, total = run_kernel(
        queries_by_head(q, shape, shape.query_tile),
        *shape.chunk_operands(stored),
        None if head_windows is None else jnp.asarray(head_windows),
        *(jnp.asarray(x) for x in (items.row_begin, items.row_count)),
        *(jnp.asarray(x) for x in (items.chunk_begin, items.chunk_count, items.chunks)),
        jnp.asarray(items.count).reshape(-1),
        jnp.asarray(partials.item_slot),
        stored.layer_operand(),
        *_choices_operands(items, shape),
    )
    return Partial(output, maximum, total)


def _choices_operands(
    items: WorkItems, shape: TileShape
) -> tuple[Int32[Array, "*W K"] | None, Float32[Array, "*W P rows"] | None]:
    """Columns of the items' chunks, and what each query row adds to the scores of a column's chunk:
    0 if it has chosen that, or `MASKED`."""
    chosen = items.chosen
    if chosen is None:
        return None, None
    shifts = jnp.where(jnp.swapaxes(chosen.by_row, -1, -2), jnp.float32(0), MASKED)
    shifts = jnp.repeat(shifts, shape.group, axis=-1)
    room = [(0, 0)] * (shifts.ndim - 1) + [(0, shape.query_tile)]
    return chosen.columns, jnp.pad(shifts, room, constant_values=MASKED)


def queries_by_head(
    q: Float[Array, "B Hq D"], shape: TileShape, padding: int
) -> Float[Array, "Hkv rows D"]:
    """The B * G query rows of each KV head in the dtype of products, and `padding` behind them.

    Any run of rows is contiguous, for any G, and a tile that begins in the last row has its room.
    """
    grouped = shape.attention.heads.split(q.astype(shape.dtype)).transpose(1, 0, 2, 3)
    rows = grouped.reshape(grouped.shape[0], -1, shape.head_dim)
    return jnp.pad(rows, ((0, 0), (0, padding), (0, 0)))
