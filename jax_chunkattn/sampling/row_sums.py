"""Sums over the vocabulary, in an order that may be fixed."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float32

RowSum = Callable[[Float32[Array, "B V"]], Float32[Array, " B"]]
"""The sum of each row."""


def row_sum(values: Float32[Array, "B V"]) -> Float32[Array, " B"]:
    """In the order that is fastest for so many rows."""
    return values.sum(axis=-1)


def softmax(logits: Float32[Array, "B V"], row_sum: RowSum) -> Float32[Array, "B V"]:
    """Of each row, in which some logit is finite."""
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / row_sum(weights)[:, None]


def log_normaliser(logits: Float32[Array, "B V"], row_sum: RowSum) -> Float32[Array, " B"]:
    """What log-probabilities are logits minus, of each row."""
    most = logits.max(axis=-1)
    most = jnp.where(jnp.isfinite(most), most, 0)
    return most + jnp.log(row_sum(jnp.exp(logits - most[:, None])))
