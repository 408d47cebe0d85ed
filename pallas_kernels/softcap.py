"""Soft capping of attention scores: Gemma 2, arXiv 2408.00118, section 2."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def cap_scores(scores: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """`softcap * tanh(scores / softcap)`: scaled scores, not masked yet. None caps nothing."""
    return scores if softcap is None else jnp.tanh(scores / softcap) * softcap
