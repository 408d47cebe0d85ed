"""Rotating pairs of a head's dimensions, as rotary position embedding does (arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rotate_pairs(
    x: Float[Array, "... D"], cos: Float32[Array, "... pairs"], sin: Float32[Array, "... pairs"]
) -> Float[Array, "... D"]:
    """Each pair `(i, i + R/2)` of the first R dimensions turned by its angle, in float32.

    Dimensions from R on are unchanged. The axes before the last are those of `x`, or 1.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
