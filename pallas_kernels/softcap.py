"""Soft capping of attention scores: Gemma 2, arXiv 2408.00118, section 2."""

from __future__ import annotations

import math

import jax.numpy as jnp


def cap_scores(scores, softcap: float | None):
    """`softcap * tanh(scores / softcap)`: scaled scores, not masked yet. None caps nothing."""
    return scores if softcap is None else jnp.tanh(scores / softcap) * softcap


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError for a softcap that is not positive and finite."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"softcap must be positive and finite, or None for scores as they are, not {softcap}"
        )
