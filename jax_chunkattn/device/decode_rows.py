"""The rows of a decode batch at one step, and where each of them is."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.plans import DecodePlan


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
        plan = self.plan
        slot = self.lengths - plan.covered_tokens
        index = jnp.minimum(slot // chunk_size, plan.private_chunks.shape[1] - 1)
        chunks = jnp.take_along_axis(plan.private_chunks, index[:, None], axis=1)[:, 0]
        return jnp.where(self.active, chunks, num_chunks), slot % chunk_size
