"""What the kernels read: block tables flattened into int32 arrays of static shape.

A plan is made on the host (`jax_chunkattn.planning`) and passed to jitted functions as a pytree.
Every array is padded to a bucketed size, so that only the sizes decide which compiled program runs.
Padding names the chunk `num_chunks` ("nowhere"): never -1, which wraps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

HostOrDevice = Array | np.ndarray
"""The host makes NumPy arrays; inside a jitted function they are JAX's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkItems:
    """Runs of full chunks, each with the contiguous range of rows that attends to all of it.

    The chunk-first phase reads a run once for all its rows (ChunkAttention, arXiv 2402.15220,
    section 3.2). A row is a sequence when decoding and a token when prefilling.

    Letters: I work items, K chunk ids of all items.
    """

    row_begin: Int32[HostOrDevice, " I"]
    row_count: Int32[HostOrDevice, " I"]
    chunk_begin: Int32[HostOrDevice, " I"]  # into `chunks`
    chunk_count: Int32[HostOrDevice, " I"]
    chunks: Int32[HostOrDevice, " K"]
    count: Int32[HostOrDevice, ""]  # items; the rest of the arrays is padding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialSlots:
    """Where the work items leave their partial results, and where each row finds its own.

    On a GPU the two phases are two launches, and partials pass from one to the other through
    memory: one slot for each row of each item, those of an item one after another.

    Letters: I work items, E = B + 1 for B rows, S slots.
    """

    item_slot: Int32[HostOrDevice, " I"]  # slot of the item's first row
    row_begin: Int32[HostOrDevice, " E"]  # into `slots`; a row's end is the next row's begin
    slots: Int32[HostOrDevice, " S"]  # of every row in turn; the length is how many slots there are


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodePlan:
    """Which chunks each row of a decode batch attends to, with shared runs named once.

    What no item covers is in `private_chunks`, in the order of the sequence: the tail comes last.

    Letters: B rows, P private chunks per row.
    """

    items: WorkItems
    private_chunks: Int32[HostOrDevice, "B P"]
    covered_tokens: Int32[HostOrDevice, " B"]  # tokens of the row that items cover: whole chunks
    partials: PartialSlots | None = None  # only for implementations that need them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sealing:
    """Which chunks a prefill call completes, and where it leaves the tokens of those it does not.

    Letters: M chunks, T packed tokens.
    """

    begin: Int32[HostOrDevice, " M"]  # the first of a chunk's packed tokens; the others follow it
    positions: Int32[HostOrDevice, " M"]  # of that token in its sequence
    chunks: Int32[HostOrDevice, " M"]  # N for padding
    tail_slots: Int32[HostOrDevice, " T"]  # one past the last slot where a token is not kept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlan:
    """Where a packed run of new tokens is written, and which earlier tokens each may see.

    Tokens of several sequences lie one after another in one array of length T. The items cover
    the chunks wholly before a sequence's first new token; the rest, from `own_chunk` on, each token
    sees up to itself. A query tile is up to `query_tile` consecutive tokens of one sequence.

    Letters: T packed tokens, Q query tiles, S sequences, P chunks per sequence.
    """

    write_chunks: Int32[HostOrDevice, " T"]  # N where a token is padding or is already in the pool
    write_offsets: Int32[HostOrDevice, " T"]
    items: WorkItems
    tile_begin: Int32[HostOrDevice, " Q"]  # first packed token of the tile
    tile_count: Int32[HostOrDevice, " Q"]
    tile_position: Int32[HostOrDevice, " Q"]  # position of that token in its sequence
    tile_sequence: Int32[HostOrDevice, " Q"]
    num_tiles: Int32[HostOrDevice, ""]
    block_tables: Int32[HostOrDevice, "S P"]
    own_chunk: Int32[HostOrDevice, " S"]  # first chunk, by index in the table, that no item covers
    partials: PartialSlots | None = None  # only for implementations that need them
    sealing: Sealing | None = None  # only where full chunks are encoded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnChunks:
    """The chunk that each row's last token lies in, exact, where the pool's are encoded.

    Letters: B rows, L layers, Hkv KV heads, S slots of C tokens, D numbers of a head.
    """

    keys: Float[Array, "L Hkv S C D"]
    values: Float[Array, "L Hkv S C D"]
    slots: Int32[HostOrDevice, " B"]  # S and more where a row has no tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """Exact keys and values of all tokens of a prefill call, where the pool's are encoded."""

    keys: Float[Array, "T Hkv D"]
    values: Float[Array, "T Hkv D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeReads:
    """Which tokens each row of a decode batch reads: the first `lengths` of its chunks in the plan.

    With `own`, those of the chunk that the last of them lies in are read there, and not in the
    pool: so what a row reads of a chunk depends on its position alone, never on when the chunk was
    encoded.

    Letters: B rows.
    """

    plan: DecodePlan
    lengths: Int32[HostOrDevice, " B"]
    own: OwnChunks | None = None

    def pool_lengths(self, chunk_size: int) -> Int32[HostOrDevice, " B"]:
        """How many of its tokens each row reads in the pool."""
        if self.own is None:
            return self.lengths
        return jnp.maximum(self.lengths - 1, 0) // chunk_size * chunk_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillReads:
    """Which tokens each packed token reads: those of its sequence in the plan, up to itself.

    With `new`, those of the chunk that it lies in are read there, and not in the pool; then each
    segment begins with the first token of a chunk.
    """

    plan: PrefillPlan
    query_tile: int = field(metadata={"static": True})  # most tokens a tile of the plan has
    new: NewTokens | None = None


def require_partials(plan: DecodePlan | PrefillPlan) -> PartialSlots:
    """The plan's slots for partials.

    Raises:
      ValueError: when it has none.
    """
    if plan.partials is None:
        raise ValueError("the plan has no slots for partials: plan with PlannerOptions.for_gpu")
    return plan.partials


def require_own(reads: DecodeReads) -> OwnChunks:
    """The rows' own chunks.

    Raises:
      ValueError: when there are none.
    """
    if reads.own is None:
        raise ValueError("encoded chunks are read here only with what each row has of its own")
    return reads.own
