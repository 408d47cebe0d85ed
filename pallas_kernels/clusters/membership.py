"""Which query heads attend alike, by the attention of a sequence's first chunk.

CHAI clusters heads by their attention over the first five tokens (arXiv 2403.08058, section 3.3).
Here it is all tokens of the chunk that all sequences with this beginning share, each query up to
itself, so that membership depends on the tokens of the chunk alone. Heads are as far apart as their
weights in total variation, which bounds how far apart their outputs of the same values may be. On a
small model of bytes (six layers of eight heads) clusters by it lost least: a KL of 0.48 and 0.84 of
36 and 24 clusters, where the weights' correlation gave 0.55 and 1.06, that of each token's apart
1.05 and 1.12, and four draws of chance 0.81 and 1.21 in the mean.

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

HeadWindow = tuple[Int32[Array, ""], Int32[Array, ""]]
"""Size and sinks of a window, of a sequence's first tokens."""

_FAR = jnp.inf


def representatives_of(
    q: Float[Array, "C H D"],
    k: Float[Array, "C Hkv D"],
    count: Int32[Array, ""],
    attention: AttentionSpec,
    membership: str = "medoid",
    seed: int = 0,
    *,
    window: HeadWindow | None = None,
) -> Int32[Array, " H"]:
    """For each query head the one that attends for its cluster, of `count` clusters.

    Args:
      q, k: of the chunk's tokens, as they attend.
      count: from 1 to H; may be traced.
      membership: one of `MEMBERSHIPS`.
      seed: of clusters by chance.
      window: of all heads, if they have one.
    """
    heads = q.shape[1]
    if membership == "random":
        order = np.random.default_rng(seed).permutation(heads).astype(np.int32)
        number = jnp.zeros(heads, jnp.int32).at[order].set(jnp.arange(heads, dtype=jnp.int32))
        return jnp.asarray(order)[number % count]
    distance = head_distances(head_attention(q, k, attention, window))
    labels = cluster(distance, count)
    if membership == "lowest":
        return labels
    return medoids(distance, labels)


def head_attention(
    q: Float[Array, "C H D"],
    k: Float[Array, "C Hkv D"],
    attention: AttentionSpec,
    window: HeadWindow | None = None,
) -> Float32[Array, "H C C"]:
    """The weights with which each token attends to those up to itself that the window, if there is
    one, lets it see, by query head."""
    tokens = len(q)
    grouped = attention.heads.split(q.astype(jnp.float32))
    scores = jnp.einsum(
        "qhgd,khd->hgqk", grouped, k.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    scores = attention.cap(scores.reshape(-1, tokens, tokens) * attention.scale)
    visible = jnp.tril(jnp.ones((tokens, tokens), jnp.bool_))
    if window is not None:
        (size, sinks), place = window, jnp.arange(tokens, dtype=jnp.int32)
        visible &= (place[None] < sinks) | (place[:, None] - place[None] < size)
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def head_distances(weights: Float32[Array, "H C C"]) -> Float32[Array, "H H"]:
    """The total variation of heads' weights, the mean over the chunk's tokens: half the sum of what
    they differ by, from 0 of heads that attend alike to 1. Weights that are no numbers are as far
    apart as can be."""

    def apart(of_head: Float32[Array, "C C"]) -> Float32[Array, " H"]:
        return jnp.abs(weights - of_head[None]).sum(axis=-1).mean(axis=-1) / 2

    above = jnp.triu(jnp.nan_to_num(lax.map(apart, weights), nan=1.0), 1)
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
