"""Clustered heads by the definition (CHAI, arXiv 2403.08058), in NumPy, over a whole sequence at
once: it knows no pool, no plan and no steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.planning.planner import bucket
from models.decoder import Decoder
from pallas_kernels.windows import Window


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def clusters_of(distance: np.ndarray, count: int) -> list[list[int]]:
    """The two clusters whose heads are nearest in the mean are joined, until so many are left."""
    clusters = [[head] for head in range(len(distance))]
    while len(clusters) > count:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
        apart = [np.mean(distance[np.ix_(clusters[a], clusters[b])]) for a, b in pairs]
        first, second = pairs[int(np.argmin(apart))]
        clusters[first] = sorted(clusters[first] + clusters.pop(second))
    return clusters


def medoid(distance: np.ndarray, cluster: Sequence[int]) -> int:
    """The head that is nearest to all others."""
    return min(cluster, key=lambda head: sum(distance[head, other] for other in cluster))


def seen_by(tokens: int, window: Window | None) -> np.ndarray:
    """Which tokens each token sees, bool [T, T]."""
    place = np.arange(tokens)
    seen = place[:, None] >= place[None]
    if window is not None:
        seen &= (place[:, None] - place[None] < window.size) | (place[None] < window.sinks)
    return seen


def representatives(
    q: np.ndarray, k: np.ndarray, count: int, scale: float, window: Window | None = None
) -> list[int]:
    """Of each query head, by the attention of q, k `[C, Hq, D]`."""
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    weights = softmax(np.where(seen_by(len(q), window), scores, -np.inf))
    distance = np.abs(weights[:, None] - weights[None]).sum(axis=-1).mean(axis=-1) / 2
    found = [0] * len(distance)
    for cluster in clusters_of(distance, count):
        for head in cluster:
            found[head] = medoid(distance, cluster)
    return found


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    size: int,
    count: int,
    scale: float,
    window: Window | None = None,
) -> np.ndarray:
    """Heads of q `[T, Hq, D]` over k, v `[T, Hkv, D]`: each for itself in the first chunk, and
    behind it one for its cluster."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(of, group, axis=1) for of in (k, v))
    tokens, seen = np.arange(len(q)), seen_by(len(q), window)

    def weights(q, k):
        return softmax(np.where(seen, np.einsum("qhd,khd->hqk", q, k) * scale, -np.inf))

    each = weights(q, k)
    if len(q) >= size:
        of = representatives(q[:size], k[:size], count, scale, window)
        together = weights(q[:, of], k[:, of])
        each = np.where((tokens < size)[None, :, None], each, together)
    return np.einsum("hqk,khd->qhd", each, v)


def logits_by_the_definition(
    model: Decoder, counts: Sequence[int], size: int, tokens: Sequence[int]
) -> np.ndarray:
    """Of what follows each token: `[T, V]`."""
    padded = np.zeros(bucket(len(tokens), 128), np.int32)  # which no token before it sees
    padded[: len(tokens)] = tokens
    return np.asarray(_run(model, tuple(counts), size)(padded))[: len(tokens)]


@functools.cache
def _run(model: Decoder, counts: tuple[int, ...], size: int):
    """NumPy within the compiled model: attention is called back."""

    def attend_layer(pool, layer, q, k, v):
        def here(layer, q, k, v):
            window = model.cache_spec.windows_of_heads[int(layer)][0]
            scale, q, k, v = q.shape[-1] ** -0.5, *(np.asarray(x, np.float64) for x in (q, k, v))
            return attend(q, k, v, size, counts[int(layer)], scale, window).astype(np.float32)

        return jax.pure_callback(here, jax.ShapeDtypeStruct(q.shape, q.dtype), layer, q, k, v), pool

    @jax.jit
    def run(tokens):
        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        hidden, _ = model(tokens, positions, None, attend_layer)
        return model.logits(hidden)

    return run
