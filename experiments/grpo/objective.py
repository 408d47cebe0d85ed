"""What GRPO maximises: Shao et al., arXiv 2402.03300, equations 3 and 4."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64

EVEN = 1e-6
"""Added to a group's standard deviation: where all rewards are equal, no answer has an
advantage."""


def advantages(
    rewards: Float64[np.ndarray, "prompts samples"],
) -> Float64[np.ndarray, "prompts samples"]:
    """How many standard deviations of its group each answer is better than the group's mean."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, keepdims=True) + EVEN)


def loss(
    logprobs: Float32[Array, "B L"],
    sampled: Float[Array, "B L"],
    reference: Float32[Array, "B L"],
    advantage: Float[Array, " B"],
    mask: Bool[Array, "B L"],
    *,
    clip: float,
    kl: float,
) -> Float32[Array, ""]:
    """Minus the clipped objective, the mean of all tokens of all answers.

    Args:
      logprobs: of the tokens by the weights that learn.
      sampled: by those that sampled them; without a gradient.
      reference: by those that they are to stay near to; without a gradient.
    """
    ratio = jnp.exp(logprobs - sampled)
    gain = advantage[:, None]
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    gained = jnp.minimum(ratio * gain, clipped * gain)
    off = reference - logprobs
    divergence = jnp.exp(off) - off - 1
    return -jnp.sum(jnp.where(mask, gained - kl * divergence, 0)) / jnp.sum(mask, dtype=jnp.float32)
