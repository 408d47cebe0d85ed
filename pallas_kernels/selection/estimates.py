"""What is known of a chunk's scores before its keys are read: the best that any of them may have.

Letters: n chunks, R queries, C tokens, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32


@runtime_checkable
class Estimate(Protocol):
    """How well a chunk scores, as far as is known of its keys."""

    def best(
        self,
        head: Int32[Array, ""],
        chunks: Int32[Array, "*rows n"],
        q: Float32[Array, "*rows R D"],
    ) -> Float32[Array, "*rows n R"]:
        """For each of these chunks and queries of a KV head."""
        ...


@dataclass(frozen=True)
class KeyScores:
    """By the scores of the keys themselves, as they are read by `gather(head, chunks)`, which
    gives `[*rows, n * C, D]`: of the best one, or of all of them `together`, the softmax of which
    is the attention that the chunk gets."""

    gather: Callable[[Int32[Array, ""], Int32[Array, "*rows n"]], Float32[Array, "*rows tokens D"]]
    together: bool = False

    def best(
        self,
        head: Int32[Array, ""],
        chunks: Int32[Array, "*rows n"],
        q: Float32[Array, "*rows R D"],
    ) -> Float32[Array, "*rows n R"]:
        """See `Estimate`."""
        keys = self.gather(head, chunks)
        scores = jnp.einsum("...td,...rd->...tr", keys, q, precision=lax.Precision.HIGHEST)
        by_chunk = scores.reshape(*chunks.shape, -1, q.shape[-2])
        return jax.nn.logsumexp(by_chunk, axis=-2) if self.together else by_chunk.max(axis=-2)


@dataclass(frozen=True)
class KeyBounds:
    """What a score can be at most: of each channel the larger of what its least number and its
    largest give (Quest, arXiv 2406.10774, section 3.3)."""

    bounds: Float[Array, "L Hkv N 2 D"]
    layer: Int32[Array, ""]

    def best(
        self,
        head: Int32[Array, ""],
        chunks: Int32[Array, "*rows n"],
        q: Float32[Array, "*rows R D"],
    ) -> Float32[Array, "*rows n R"]:
        """See `Estimate`."""
        ends = self.bounds.at[self.layer, head, chunks].get(mode="promise_in_bounds")
        both = ends.astype(jnp.float32).reshape(*chunks.shape, -1)
        signed = jnp.concatenate([jnp.minimum(q, 0), jnp.maximum(q, 0)], axis=-1)
        return jnp.einsum("...nd,...rd->...nr", both, signed, precision=lax.Precision.HIGHEST)


def key_bounds(keys: Float[Array, "*chunks C D"]) -> Float32[Array, "*chunks 2 D"]:
    """The least and the largest number of each channel of a chunk's keys."""
    wide = jnp.nan_to_num(keys.astype(jnp.float32))
    return jnp.stack([wide.min(axis=-2), wide.max(axis=-2)], axis=-2)
