"""Which query heads attend alike, by the attention of a sequence's first chunk.

CHAI clusters heads by their attention over the first five tokens (arXiv 2403.08058, section 3.3).
Here it is all tokens of the chunk that all sequences with this beginning share, each query up to
itself, so that membership depends on the tokens of the chunk alone.

Letters: H query heads, C tokens of the chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec

MEMBERSHIPS = ("medoid", "lowest", "random")
MOST_HEADS = 255
"""A head is kept in 8 bits, where all of them are no head."""

_RANDOM_SEED = 0
_FAR = jnp.inf


def representatives_of(
    q: Float[Array, "C H D"],
    k: Float[Array, "C Hkv D"],
    count: Int32[Array, ""],
    attention: AttentionSpec,
    membership: str = "medoid",
) -> Int32[Array, " H"]:
    """For each query head the one that attends for its cluster, of `count` clusters.

    Args:
      q, k: of the chunk's tokens, as they attend.
      count: from 1 to H; may be traced.
      membership: one of `MEMBERSHIPS`.
    """
    heads = q.shape[1]
    if membership == "random":
        order = np.random.default_rng(_RANDOM_SEED).permutation(heads).astype(np.int32)
        number = jnp.zeros(heads, jnp.int32).at[order].set(jnp.arange(heads, dtype=jnp.int32))
        return jnp.asarray(order)[number % count]
    distance = head_distances(head_attention(q, k, attention))
    labels = cluster(distance, count)
    if membership == "lowest":
        return labels
    return medoids(distance, labels)


def head_attention(
    q: Float[Array, "C H D"], k: Float[Array, "C Hkv D"], attention: AttentionSpec
) -> Float32[Array, "H C C"]:
    """The weights with which each token attends to those up to itself, by query head."""
    tokens = len(q)
    grouped = attention.heads.split(q.astype(jnp.float32))
    scores = jnp.einsum(
        "qhgd,khd->hgqk", grouped, k.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    scores = attention.cap(scores.reshape(-1, tokens, tokens) * attention.scale)
    causal = jnp.tril(jnp.ones((tokens, tokens), jnp.bool_))
    return jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)


def head_distances(weights: Float32[Array, "H C C"]) -> Float32[Array, "H H"]:
    """One minus the correlation of heads' weights, over each token and those up to it: from 0 of
    heads that attend alike to 2. A head whose weights are all the same is 1 away from others, and
    so is one with weights that are no numbers."""
    tokens = weights.shape[-1]
    seen = np.tril_indices(tokens)
    flat = weights[:, *seen]
    centred = flat - flat.mean(axis=1, keepdims=True)
    norm = jnp.linalg.norm(centred, axis=1, keepdims=True)
    unit = jnp.where(norm > 0, centred / jnp.where(norm > 0, norm, 1), 0)
    correlation = jnp.dot(unit, unit.T, precision=lax.Precision.HIGHEST)
    above = jnp.triu(1 - jnp.nan_to_num(correlation), 1)
    return above + above.T  # to the bit: of two heads, each is as far from the other


def cluster(distance: Float32[Array, "H H"], count: Int32[Array, ""]) -> Int32[Array, " H"]:
    """Joins the two nearest clusters until `count` are left, by the mean distance of their heads
    (average linkage); of equally near ones the first. Each head's label is the first head of its
    cluster."""
    heads = len(distance)
    head = jnp.arange(heads, dtype=jnp.int32)
    apart = jnp.where(head[:, None] < head[None], distance, _FAR)

    def join(_, state):
        apart, sizes, labels = state
        nearest = jnp.argmin(apart).astype(jnp.int32)
        first, second = nearest // heads, nearest % heads
        both = jnp.where(jnp.isfinite(apart), apart, apart.T)
        total = sizes[first] + sizes[second]
        mean = (both[first] * sizes[first] + both[second] * sizes[second]) / total
        mean = mean.at[jnp.stack([first, second])].set(_FAR)
        apart = apart.at[first].set(jnp.where(head > first, mean, _FAR))
        apart = apart.at[:, first].set(jnp.where(head < first, mean, _FAR))
        apart = apart.at[second].set(_FAR).at[:, second].set(_FAR)
        sizes = sizes.at[first].set(total)
        return apart, sizes, jnp.where(labels == second, first, labels)

    start = apart, jnp.ones(heads, jnp.float32), head
    return lax.fori_loop(0, heads - count, join, start)[2]


def medoids(distance: Float32[Array, "H H"], labels: Int32[Array, " H"]) -> Int32[Array, " H"]:
    """For each head the one of its cluster whose distances to all others in it have the least sum;
    of equal ones the first."""
    together = labels[:, None] == labels[None]
    total = jnp.where(together, distance, 0).sum(axis=1)
    best = jnp.argmin(jnp.where(together, total[None], _FAR), axis=1)
    return best.astype(jnp.int32)
