"""The rows of a decode batch at one step, and where each of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.plans import DecodePlan

State = TypeVar("State")


@dataclass(frozen=True)
class DecodeRows:
    """Each row of the plan: its slot, the tokens it has in the pool, and whether it goes on.

    The token that a step computes comes behind those. A slot of S or more is padding.
    """

    plan: DecodePlan
    slots: Int32[Array, " B"]
    lengths: Int32[Array, " B"]
    active: Bool[Array, " B"]

    def place(
        self, num_chunks: int, chunk_size: int
    ) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
        """The chunk and the offset in it where the step's token goes; chunk N for frozen rows."""
        chunks, offsets = self.place_by_window(num_chunks, chunk_size)
        if self.plan.hidden is not None:  # all windows' rows end in the same chunks
            chunks, offsets = chunks[0], offsets[0]
        return chunks, offsets

    def place_by_window(
        self, num_chunks: int, chunk_size: int
    ) -> tuple[Int32[Array, "*W B"], Int32[Array, "*W B"]]:
        """The same for each window, where heads with windows have chunks of their own."""
        private = jnp.asarray(self.plan.private_chunks)
        shape = private.shape[:-1]
        slot = jnp.broadcast_to(self.lengths, shape) - self.plan.covered_tokens
        index = jnp.minimum(slot // chunk_size, private.shape[-1] - 1)
        chunks = jnp.take_along_axis(private, index[..., None], axis=-1)[..., 0]
        active = jnp.broadcast_to(self.active, shape)
        return jnp.where(active, chunks, num_chunks), slot % chunk_size

    def place_in_tails(
        self, num_slots: int, num_chunks: int, chunk_size: int
    ) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
        """The slot and the offset in its tail where the step's token goes; slot S for frozen
        rows."""
        _, offsets = self.place(num_chunks, chunk_size)
        return jnp.where(self.active, self.slots, num_slots), offsets

    def for_each_filled(
        self,
        num_chunks: int,
        chunk_size: int,
        update: Callable[[Int32[Array, ""], Int32[Array, ""], State], State],
        state: State,
    ) -> State:
        """`update(row, chunk, state)` for each row whose chunk the step's token has filled, one
        after another."""
        chunks, offsets = self.place(num_chunks, chunk_size)
        filled = self.active & (offsets == chunk_size - 1)
        order = jnp.argsort(~filled)  # those first

        def step(index: Int32[Array, ""], state: State) -> State:
            row = order[index]
            return update(row, chunks[row], state)

        return lax.fori_loop(0, filled.sum(dtype=jnp.int32), step, state)
