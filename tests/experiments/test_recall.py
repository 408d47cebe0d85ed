"""How much of their attention queries keep that choose what they read."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.quality.recall import Recall
from experiments.quality.scoring import Passage
from models.dense_attention import attention_scores, dense_attend, empty_pool
from pallas_kernels.selection import ChunkSelector
from pallas_kernels.windows import Window, WindowMap

SIZE, PREFIX, WINDOW = 16, 128, 40


@pytest.fixture(scope="module")
def model():
    return models.load("random:tiny").model


@pytest.fixture(scope="module")
def passage():
    tokens = np.random.default_rng(0).integers(1, 200, PREFIX + WINDOW + 1)
    return Passage.of(tokens.tolist(), PREFIX, WINDOW, 1)


def attention(model, passage) -> np.ndarray:
    """Of all layers and heads, by the definition: float64 [L, Hq, P+T, P+T]."""
    spec, tokens = model.cache_spec, jnp.concatenate([passage.prefix, passage.inputs[0]])
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    plain = dense_attend(positions, spec)

    def attend(carry, layer, q, k, v):
        pool, scores = carry
        output, pool = plain(pool, layer, q, k, v)
        return output, (pool, scores.at[layer].set(attention_scores(spec, q, k)))

    scores = jnp.zeros(
        (spec.num_layers, spec.attention.heads.query_heads, len(tokens), len(tokens))
    )
    start = empty_pool(spec, len(tokens)), scores
    _, (_, scores) = model(tokens, positions, start, attend)
    scores = np.asarray(scores, np.float64)
    causal = np.tril(np.ones((len(tokens),) * 2, bool))
    weights = np.where(causal, np.exp(scores), 0)
    return weights / weights.sum(axis=-1, keepdims=True)


def test_recall_is_the_attention_that_lies_in_the_chunks_that_are_read(model, passage):
    """Of the last chunks, which are known without looking."""
    selector = ChunkSelector(0.4, "recent", sinks=1, recent=1, refresh=4, whole=0)
    kept, weights = [], attention(model, passage)
    for query in range(PREFIX, PREFIX + WINDOW, 4):
        own = query // SIZE
        last = selector.counts(own + 1)[own] - 1
        read = [0, *range(own + 1 - last, own + 1)]
        tokens = (np.array(read)[:, None] * SIZE + np.arange(SIZE)).ravel()
        kept.append(weights[:, :, query, tokens[tokens <= query]].sum(axis=-1))
    found = Recall.of(model, passage, selector, SIZE)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(kept), abs=1e-5)
    assert found.fifth == pytest.approx(np.percentile(np.stack(kept, axis=1), 5), abs=1e-5)
    assert 0.2 < found.mean < 0.9


def test_who_reads_all_keeps_all_and_nobody_more_than_who_looks_at_attention_itself(model, passage):
    everything = Recall.of(model, passage, ChunkSelector(1.0), SIZE)
    assert everything is not None
    assert everything.mean == pytest.approx(1, abs=1e-6)
    best, scored = (
        Recall.of(model, passage, ChunkSelector(0.4, policy, whole=0), SIZE)
        for policy in ("oracle", "scores")
    )
    assert best is not None
    assert scored is not None
    assert 0.2 < scored.mean <= best.mean + 1e-6 < 1


def test_dense_layers_are_left_out(model, passage):
    """Which keep everything: what is left is another layer's."""
    layers = model.cache_spec.num_layers
    selector = ChunkSelector(0.4, "recent", whole=0)
    every = [
        Recall.of(model, passage, ChunkSelector(0.4, "recent", whole=0, dense_layers=others), SIZE)
        for others in (tuple(set(range(layers)) - {layer}) for layer in range(layers))
    ]
    together = Recall.of(model, passage, selector, SIZE)
    assert together is not None
    means = [one.mean for one in every if one is not None]
    assert np.mean(means) == pytest.approx(together.mean, abs=1e-6)


def test_a_model_whose_heads_have_windows_has_none(passage):
    windowed = models.load("random:tiny").model
    layers = windowed.cache_spec.num_layers
    pattern = WindowMap((None, Window(9)), ((0, 1),) * layers)
    windowed.cache_spec = replace(windowed.cache_spec, windows=pattern)
    assert Recall.of(windowed, passage, ChunkSelector(0.4), SIZE) is None
