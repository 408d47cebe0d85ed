"""Sums over the vocabulary, which may be the same bits for a row in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float32


def _sum_of(values: Float32[Array, "B V"]) -> Float32[Array, " B"]:
    return values.sum(axis=-1)


def _exponentials_of(
    values: Float32[Array, "B V"], most: Float32[Array, " B"]
) -> Float32[Array, "B V"]:
    return jnp.exp(values - most[:, None])


@dataclass(frozen=True)
class RowSums:
    """How rows are added up, and what softmax adds up; by XLA unless said otherwise.

    Attributes:
      total: of each row.
      exponentials: of a row's numbers less a number of its own.
    """

    total: Callable[[Float32[Array, "B V"]], Float32[Array, " B"]] = _sum_of
    exponentials: Callable[[Float32[Array, "B V"], Float32[Array, " B"]], Float32[Array, "B V"]] = (
        _exponentials_of
    )

    def softmax(self, logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        """Of each row, in which some logit is finite."""
        weights = self.exponentials(logits, logits.max(axis=-1))
        return weights / self.total(weights)[:, None]

    def log_normaliser(self, logits: Float32[Array, "B V"]) -> Float32[Array, " B"]:
        """What log-probabilities are logits minus, of each row."""
        most = logits.max(axis=-1)
        most = jnp.where(jnp.isfinite(most), most, 0)
        return most + jnp.log(self.total(self.exponentials(logits, most)))


IN_XLA = RowSums()
