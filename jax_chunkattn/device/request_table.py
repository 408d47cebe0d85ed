"""What the device keeps between calls: the pool, and a slot for every running request.

A row's chosen token, length and budget never leave the device between two calls, so that a call can
be dispatched before the host has seen the results of the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jax_chunkattn.device.clustered_pool import ClusteredPool
from jax_chunkattn.device.coded_pool import CodedPool
from jax_chunkattn.device.pool import ChunkPool, Pool, SelectivePool, WindowPool
from jax_chunkattn.sampling import RowSampling, SamplingParams, TokenCounts
from pallas_kernels.plans import HostOrDevice


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """Where every row stands between two tokens.

    A row with `remaining` 0 is frozen: it is finished, or padding.
    """

    tokens: Int32[HostOrDevice, " B"]  # chosen, not yet fed to the model
    lengths: Int32[HostOrDevice, " B"]  # tokens whose keys and values are in the pool
    remaining: Int32[HostOrDevice, " B"]  # tokens the row may still choose

    def choose(
        self, following: Int32[Array, " B"], stop_tokens: Int32[HostOrDevice, "B E"]
    ) -> RowState:
        """The rows with their next tokens: a row freezes at a stop token, or at its last token.

        One without a choice (`NO_CHOICE`) freezes too, and keeps the token before it. Lengths stay
        as they are; frozen rows stay as they are in all.
        """
        active = (self.remaining > 0) & (following >= 0)
        stopped = (following[:, None] == stop_tokens).any(axis=-1)
        remaining = jnp.where(stopped, 0, self.remaining - 1)
        return replace(
            self,
            tokens=jnp.where(active, following, self.tokens),
            remaining=jnp.where(active, remaining, 0),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RequestTable:
    """The rows of all running requests, by slot. Letters: S slots, V vocabulary.

    A slot from S up stands for no request: reading it gives a frozen row, writing it does nothing.
    """

    rows: RowState  # S
    sampling: RowSampling  # S
    counts: TokenCounts  # S, V

    @property
    def num_slots(self) -> int:
        return self.counts.generated.shape[0]

    @classmethod
    def of(
        cls,
        rows: RowState,
        params: Sequence[SamplingParams],
        vocab_size: int,
        stop_tokens: Sequence[int] = (),
    ) -> RequestTable:
        """A table of rows that have generated nothing, with slots in their order.

        `params` may be shorter than the rows; greedy ones follow.
        """
        slots = rows.tokens.shape[0]
        counts = TokenCounts(
            jnp.zeros((slots, vocab_size), jnp.bool_), jnp.zeros((slots, vocab_size), jnp.int32)
        )
        return cls(rows, RowSampling.stack(params, slots, stop_tokens), counts)

    @classmethod
    def empty(cls, slots: int, vocab_size: int) -> RequestTable:
        """A table of frozen rows, on the default device."""
        rows = RowState(*np.zeros((3, slots), np.int32))
        return jax.tree.map(jnp.asarray, cls.of(rows, [], vocab_size))

    def take(self, slots: Int32[Array, " B"]) -> tuple[RowState, RowSampling]:
        """State and parameters of these slots."""

        def fill(values):
            return jnp.asarray(values).at[slots].get(mode="fill", fill_value=0)

        return jax.tree.map(fill, self.rows), self.sampling.take(slots)

    def put(self, slots: Int32[Array, " B"], rows: RowState) -> RequestTable:
        """The table with these rows' states in their slots."""
        return replace(self, rows=_set(self.rows, slots, rows))


def count_tokens(
    counts: TokenCounts, slots: Int32[Array, " B"], tokens: Int32[Array, " B"], where: HostOrDevice
) -> TokenCounts:
    """Counts one generated token for each slot, `where` (Bool [B]) that is so and there is one."""
    slots = jnp.where(where & (tokens >= 0), slots, counts.generated.shape[0])
    return replace(counts, generated=counts.generated.at[slots, tokens].add(1, mode="drop"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """All that calls to the device update; donate it, and it is updated in place."""

    pool: Pool
    table: RequestTable


def copy_chunks(
    state: DeviceState,
    sources: Int32[HostOrDevice, " M"],
    destinations: Int32[HostOrDevice, " M"],
    windowed: tuple[Int32[HostOrDevice, " M"], Int32[HostOrDevice, " M"]] | None = None,
) -> DeviceState:
    """Copies chunks within the pool, all layers of them; all are read before any is written.

    A destination of N and more is padding. `windowed` has sources and destinations for heads with
    windows, where those have chunks of their own.
    """
    if isinstance(state.pool, WindowPool):
        assert windowed is not None, "their chunks have other ids"
        return replace(state, pool=state.pool.copy(sources, destinations, windowed))
    chunks = state.pool.chunks.copied(sources, destinations)
    return replace(state, pool=state.pool.with_chunks(chunks))


def copy_tails(
    state: DeviceState,
    sources: Int32[HostOrDevice, " M"],
    destinations: Int32[HostOrDevice, " M"],
) -> DeviceState:
    """Copies the exact last chunks that slots have where those are kept apart; all are read before
    any is written. A destination of S is padding."""
    assert isinstance(state.pool, CodedPool | ClusteredPool), "the others have no tails"
    return replace(state, pool=state.pool.copy_tails(sources, destinations))


def write_chunk(
    state: DeviceState,
    chunk: Int32[HostOrDevice, ""],
    position: Int32[HostOrDevice, ""],
    keys: Float[HostOrDevice, "L Hkv C D"],
    values: Float[HostOrDevice, "L Hkv C D"],
) -> DeviceState:
    """Writes given keys and values into a chunk, as those of tokens from a position on; a chunk of
    N drops them."""
    pool = state.pool
    assert isinstance(pool, ChunkPool | CodedPool | SelectivePool), "the others take none"
    exact = jnp.asarray(keys), jnp.asarray(values)
    return replace(state, pool=pool.write_chunk(chunk, position, *exact))


def place_rows(
    state: DeviceState, slots: Int32[HostOrDevice, " M"], rows: RowState, sampling: RowSampling
) -> DeviceState:
    """Gives slots to new rows, that have generated nothing as far as penalties are concerned."""
    table = state.table.put(jnp.asarray(slots), rows)
    counts = jax.tree.map(
        lambda values: values.at[slots].set(jnp.zeros((), values.dtype), mode="drop"), table.counts
    )
    table = replace(table, sampling=_set(table.sampling, slots, sampling), counts=counts)
    return replace(state, table=table)


def place_counts(
    state: DeviceState,
    slot: Int32[HostOrDevice, ""],
    prompt: Bool[HostOrDevice, " V"],
    generated: Int32[HostOrDevice, " V"],
) -> DeviceState:
    """What a placed row has seen, for its penalties."""
    counts = TokenCounts(
        state.table.counts.prompt.at[slot].set(prompt),
        state.table.counts.generated.at[slot].set(generated),
    )
    return replace(state, table=replace(state.table, counts=counts))


def _set(table, slots, rows):
    """`table`, which may be the host's, with `rows` in these slots."""

    def put(old, new):
        return jnp.asarray(old).at[slots].set(new, mode="drop")

    return jax.tree.map(put, table, rows)
