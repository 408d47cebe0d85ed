"""Partial attention results and how two of them merge (online softmax, float32).

Milakov and Gimelshein, arXiv 1805.02867; as a merge of two attention states: ChunkAttention,
arXiv 2402.15220, equation 2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32

# Finite, so that the difference of two masked maxima is 0 and not NaN.
MASKED = -1e30


class Partial(NamedTuple):
    """Attention over some keys: un-normalised output, running maximum, sum of exponentials."""

    output: Float32[Array, "*rows D"]
    maximum: Float32[Array, "*rows"]
    total: Float32[Array, "*rows"]


def empty(rows: tuple[int, ...], head_dim: int) -> Partial:
    """Attention over no keys: the neutral element of `merge`."""
    return Partial(
        jnp.zeros((*rows, head_dim), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    scale_a = jnp.exp(a.maximum - maximum)
    scale_b = jnp.exp(b.maximum - maximum)
    return Partial(
        a.output * scale_a[..., None] + b.output * scale_b[..., None],
        maximum,
        a.total * scale_a + b.total * scale_b,
    )


def normalise(partial: Partial) -> Float32[Array, "*rows D"]:
    """The attention output; zeros where there were no keys at all, NaN where a score was NaN."""
    seen = partial.total != 0
    return jnp.where(
        seen[..., None], partial.output / jnp.where(seen, partial.total, 1)[..., None], 0
    )
