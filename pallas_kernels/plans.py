"""What the kernels read: block tables flattened into int32 arrays of static shape.

A plan is made on the host (`jax_chunkattn.planner`, `jax_chunkattn.prefill`) and passed to jitted
functions as a pytree. Every array is padded to a bucketed size, so that only the sizes decide which
compiled program runs. Padding names the chunk `num_chunks` ("nowhere"): never -1, which wraps.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodePlan:
    """Which chunks each row of a decode batch attends to, with shared runs named once.

    A work item is a run of full chunks that a contiguous range of rows attends to; the chunk-first
    phase reads it once for all of them (ChunkAttention, arXiv 2402.15220, section 3.2). What no
    item covers is in `private_chunks`, in the order of the sequence, so the tail comes last.

    Letters: B rows, I work items, K chunk ids of all items, P private chunks per row.
    """

    item_row_begin: Int32[Array, " I"]
    item_row_count: Int32[Array, " I"]
    item_chunk_begin: Int32[Array, " I"]  # into item_chunks
    item_chunk_count: Int32[Array, " I"]
    item_chunks: Int32[Array, " K"]
    num_items: Int32[Array, ""]  # the rest of the item arrays is padding
    private_chunks: Int32[Array, "B P"]
    covered_tokens: Int32[Array, " B"]  # tokens of the row that items cover: whole chunks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlan:
    """Where a packed run of new tokens is written, and which earlier tokens each may see.

    Tokens of several sequences lie one after another in one array of length T. A query tile is up
    to `query_tile` consecutive tokens of one sequence.

    Letters: T packed tokens, Q query tiles, S sequences, P chunks per sequence.
    """

    write_chunks: Int32[Array, " T"]  # N where a token is padding or is already in the pool
    write_offsets: Int32[Array, " T"]
    tile_begin: Int32[Array, " Q"]  # first packed token of the tile
    tile_count: Int32[Array, " Q"]
    tile_position: Int32[Array, " Q"]  # position of that token in its sequence
    tile_sequence: Int32[Array, " Q"]
    num_tiles: Int32[Array, ""]
    block_tables: Int32[Array, "S P"]
