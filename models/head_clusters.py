"""How many clusters the query heads of each layer form, found on a text, and kept in a file.

CHAI (arXiv 2403.08058, section 3.2) clusters the heads of a layer by k-means on their attention
over samples, and takes as many clusters as the elbow of the error says. Which heads are in them is
not kept: it depends on what is read (`pallas_kernels.clusters.membership`).

Letters: L layers, H query heads, P pieces of a text of C tokens.
"""

from __future__ import annotations

import heapq
import itertools
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Float64, Int32
from scipy.cluster.vq import kmeans2

from models.decoder import Decoder
from models.dense_attention import dense_attend, empty_pool
from models.errors import LayerFileError
from models.layer_file import LayerFile
from models.sizes import MOST_HEADS
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.clusters.membership import head_attention

CLUSTERS = LayerFile("clusters", "clusters of heads", range(1, MOST_HEADS + 1))

_RESTARTS = 8
_DIGITS = 6
"""Heads that are no further apart attend the same."""


def load_clusters(path: str | Path, model: Decoder, membership: str = "medoid") -> HeadClusters:
    """Those of a file, for this model.

    Raises:
      LayerFileError: when they were found on another, or the file cannot be used.
    """
    clusters = HeadClusters(CLUSTERS.read(path).values or (1,), membership)
    spec = model.cache_spec
    try:
        clusters.check(spec.num_layers, spec.attention.heads)
    except ValueError as error:
        raise LayerFileError(f"{path}: the clusters are of another model: {error}") from error
    CLUSTERS.load(path, model)
    return clusters


def head_correlations(
    model: Decoder, pieces: Int32[np.ndarray, "P C"]
) -> Float64[np.ndarray, "L H H"]:
    """How the attention of a layer's heads correlates, over all tokens of all pieces, each read by
    itself, and those up to each token; 0 for heads whose attention is always the same."""
    split = nnx.split(model)
    products = sum(np.asarray(_products(*split, piece), np.float64) for piece in pieces)
    norm = np.sqrt(np.einsum("lhh->lh", products))
    unit = np.where(norm > 0, norm, 1)
    return products / (unit[:, :, None] * unit[:, None])


@partial(jax.jit, static_argnums=0)
def _products(graphdef, state, tokens: jax.Array) -> jax.Array:
    """Of the heads' attention weights less their mean, `[L, H, H]`."""
    model = nnx.merge(graphdef, state)
    spec, positions = model.cache_spec, jnp.arange(len(tokens), dtype=jnp.int32)
    dtype = jnp.result_type(*jax.tree.leaves(state))
    dense = dense_attend(positions, spec)
    seen = np.tril_indices(len(tokens))

    def attend(carried, layer, q, k, v):
        pool, products = carried
        weights = head_attention(q, k, spec.attention, spec.layer_window(layer))[:, *seen]
        centred = weights - weights.mean(axis=1, keepdims=True)
        product = jnp.dot(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
        out, pool = dense(pool, layer, q, k, v)
        return out, (pool, products.at[layer].set(product))

    pool = empty_pool(spec, len(tokens), dtype)
    products = jnp.zeros((spec.num_layers, spec.num_heads, spec.num_heads), jnp.float32)
    _, (_, products) = model(tokens, positions, (pool, products), attend)
    return products


def clustering_errors(
    correlations: Float64[np.ndarray, "L H H"], seed: int = 0
) -> Float32[np.ndarray, "L H"]:
    """What is left of the heads' attention, as a share of it, when each is taken for the mean of
    its cluster, of 1 to H clusters of k-means; the best of several starts, and never more than of
    fewer clusters."""
    return np.stack([_errors_of_layer(layer, seed) for layer in correlations])


def _errors_of_layer(correlation: Float64[np.ndarray, "H H"], seed: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(correlation)
    points = vectors * np.sqrt(np.maximum(values, 0))  # as far apart as the heads' weights
    different = len(np.unique(np.round(points, _DIGITS), axis=0))
    errors = np.zeros(len(points), np.float32)
    for count in range(1, different):
        errors[count - 1] = min(_error(points, count, (seed, start)) for start in range(_RESTARTS))
    return np.minimum.accumulate(errors)


def _error(points: np.ndarray, count: int, seed: tuple[int, int]) -> float:
    random = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a cluster that is left empty
        centres, labels = kmeans2(points, count, minit="++", rng=random)
    return float(np.square(points - centres[labels]).sum() / max(np.square(points).sum(), 1e-30))


def elbows(errors: Float32[np.ndarray, "L H"]) -> tuple[int, ...]:
    """Of each layer the number of clusters where the error, over the number, is furthest below the
    straight line from one cluster to as many as heads (Satopaa et al., ICDCSW 2011)."""
    counts = []
    for error in errors:
        place = np.linspace(0, 1, len(error))
        line = error[0] * (1 - place)
        counts.append(int(np.argmax(line - error)) + 1 if error[0] > 0 else 1)
    return tuple(counts)


def counts_within(errors: Float32[np.ndarray, "L H"], share: float) -> tuple[int, ...]:
    """Clusters of each layer, that share of all heads in all, at least one each: heads are joined
    where the error grows least by it.

    Raises:
      ValueError: for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the heads is above 0 and at most 1, got {share}")
    layers, heads = errors.shape
    counts = [heads] * layers

    def cost(layer: int) -> float:
        count = counts[layer]
        return float(errors[layer, count - 2] - errors[layer, count - 1]) if count > 1 else np.inf

    queue = [(cost(layer), layer) for layer in range(layers)]
    heapq.heapify(queue)
    for _ in itertools.repeat(None, layers * heads - max(layers, round(share * layers * heads))):
        _, layer = heapq.heappop(queue)
        counts[layer] -= 1
        heapq.heappush(queue, (cost(layer), layer))
    return tuple(counts)
