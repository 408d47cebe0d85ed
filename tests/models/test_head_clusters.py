"""Counts of clusters: how they are found, and their files."""

from __future__ import annotations

import numpy as np
import pytest

import models
from models import LayerFileError
from models.head_clusters import (
    CLUSTERS,
    clustering_errors,
    counts_within,
    elbows,
    head_correlations,
    load_clusters,
)
from tests.jax_chunkattn.rule import clusters as definition
from tests.jax_chunkattn.toy import layered_model


@pytest.fixture(scope="module")
def model():
    return models.load("random:tiny").model


def block_correlations(*sizes: int) -> np.ndarray:
    """Of heads that attend in groups of these sizes, alike within and not at all between."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(label[:, None] == label[None], 1.0, 0.0)


@pytest.mark.parametrize("windowed", [False, True])
def test_heads_correlate_as_their_weights_do(model, windowed):
    model = layered_model() if windowed else model
    pieces = np.random.default_rng(0).integers(0, 256, (3, 24)).astype(np.int32)
    found = head_correlations(model, pieces)
    recorded: list[list[np.ndarray]] = []
    original = definition.attend

    def record(q, k, v, size, count, scale, window):
        length = pieces.shape[1]  # behind them is padding
        wide = np.repeat(k[:length], q.shape[1] // k.shape[1], axis=1)
        scores = np.einsum("qhd,khd->hqk", q[:length], wide) * scale
        weights = definition.softmax(np.where(definition.seen_by(length, window), scores, -np.inf))
        weights = weights[:, np.tril(np.ones((length, length), bool))]
        recorded[-1].append(weights - weights.mean(axis=1, keepdims=True))
        return original(q, k, v, size, count, scale, window)

    definition.attend = record
    try:
        for piece in pieces:
            recorded.append([])
            definition.logits_by_the_definition(model, (4, 4), 100, piece.tolist())
    finally:
        definition.attend = original
    for layer in range(2):
        weights = np.concatenate([piece[layer] for piece in recorded], axis=1)
        unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
        np.testing.assert_allclose(found[layer], unit @ unit.T, atol=1e-5)


def test_the_elbow_is_where_heads_of_a_group_are_together():
    correlations = np.stack([block_correlations(3, 3, 2), block_correlations(1, 7)])
    errors = clustering_errors(correlations)
    assert elbows(errors) == (3, 2)
    assert errors[0, 2] == 0
    assert errors[0, 1] > 0.1
    assert (np.diff(errors, axis=1) <= 0).all()
    np.testing.assert_array_equal(errors, clustering_errors(correlations))  # by one seed


def test_heads_are_joined_where_it_costs_least():
    errors = clustering_errors(np.stack([block_correlations(3, 3, 2), block_correlations(1, 7)]))
    assert counts_within(errors, 5 / 16) == (3, 2)
    assert counts_within(errors, 1) == (8, 8)
    assert counts_within(errors, 0.01) == (1, 1)
    for share in (0.25, 0.5, 0.75):
        assert sum(counts_within(errors, share)) == round(16 * share)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        counts_within(errors, 0)


def test_a_file_is_of_the_model_that_they_were_found_on(model, tmp_path):
    path = tmp_path / "clusters.json"
    CLUSTERS.write(path, [3, 2], model, {"counted": "elbow"})
    assert load_clusters(path, model).counts == (3, 2)
    with pytest.raises(LayerFileError, match="were measured on another model"):
        load_clusters(path, models.load("random:tiny", seed=1).model)
    for counts, words in (([3], "clusters of 1 layers for a model of 2"), ([3, 9], "of 4 heads")):
        CLUSTERS.write(path, counts, model, {})
        with pytest.raises(LayerFileError, match=words):
            load_clusters(path, model)
    CLUSTERS.write(path, [0, 1], model, {})
    with pytest.raises(LayerFileError, match="must be a list of clusters of heads from 1"):
        load_clusters(path, model)
