"""Choosing the next token on the device, every row by its own rules and its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.plans import HostOrDevice


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
      max_tokens: most tokens to generate.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keeps the k likeliest tokens (and ties with the last of them); 0 keeps all.
      top_p: then keeps the smallest set of likeliest tokens with at least this probability.
      seed: a row's random numbers depend on this and on the position only, never on the batch.

    Raises:
      ValueError: for a value outside its range.
    """

    max_tokens: int = 48
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must fit 32 bits, got {self.seed}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """The sampling parameters of every row of a batch."""

    temperature: Float32[HostOrDevice, " B"]
    top_k: Int32[HostOrDevice, " B"]
    top_p: Float32[HostOrDevice, " B"]
    seed: UInt32[HostOrDevice, " B"]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], rows: int) -> RowSampling:
        """Parameters of each row, padded to `rows` with greedy ones."""
        padded = [*params, *[SamplingParams()] * (rows - len(params))]
        return cls(
            np.array([p.temperature for p in padded], np.float32),
            np.array([p.top_k for p in padded], np.int32),
            np.array([p.top_p for p in padded], np.float32),
            np.array([p.seed for p in padded], np.uint32),
        )


def sample(
    logits: Float[Array, "B V"], sampling: RowSampling, positions: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """The token of each row, to stand at `positions`.

    A batch that is greedy in every row costs an argmax and nothing more.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def choose():
        drawn = _draw(_truncate(logits, sampling), sampling.seed, positions)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(sampling.temperature > 0), choose, lambda: greedy)


def _draw(logits, seeds, positions):
    """One token a row, by adding Gumbel noise and taking the largest."""

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    noisy = logits + jax.vmap(noise)(seeds, positions)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def _truncate(logits, sampling: RowSampling):
    """Logits over temperature, minus infinity outside top-k and top-p."""
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1)
    logits = logits / temperature[:, None]
    order = _order(logits)

    everything = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    threshold = _threshold(order, jnp.ones_like(logits), everything.astype(jnp.float32))
    kept = order >= threshold[:, None]

    probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    threshold = _threshold(order, probabilities, sampling.top_p)
    within = (order >= threshold[:, None]) | (sampling.top_p >= 1)[:, None]
    return jnp.where(kept & within, logits, -jnp.inf)


def _order(values):
    """uint32 keys that sort as the float32 values do."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(order, weights, target):
    """The largest key at or above which a row's weights add up to at least the target.

    Found bit by bit, 32 sums over the vocabulary, where a sort would move it some 16 times.
    """

    def decide(index, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        above = jnp.where(order >= candidate[:, None], weights, 0).sum(axis=-1)
        return jnp.where(above >= target, candidate, threshold)

    return lax.fori_loop(0, 32, decide, jnp.zeros(order.shape[:1], jnp.uint32))
