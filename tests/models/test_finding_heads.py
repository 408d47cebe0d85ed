"""Retrieval heads are found, by scores and by gates."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from models import Decoder, DecoderConfig, HeadPatternError
from models.decoder import Block
from models.dense_attention import dense_attend, empty_pool
from models.head_patterns import GateTraining, HeadPattern, copy_scores, gates, with_pattern
from models.head_patterns.gates import learning_rate
from tests.jax_chunkattn.toy import toy_model

TOKENS = np.random.default_rng(0).integers(1, 128, 96).astype(np.int32)
LABELS = np.arange(80, 96, dtype=np.int32)
SINKS, RECENT = 4, 16


@functools.cache
def finding_model(shift: int) -> Decoder:
    """Of one layer without positions, whose first KV head attends to the token that is `shift`
    above the query's, wherever it stands, and adds what it finds, and whose second attends to
    everything alike and adds nothing.
    """
    size = 64
    config = DecoderConfig(size, size, 8, 1, 2, 2, size, rope=None, tie_embeddings=True)
    model = Decoder(config, rngs=nnx.Rngs(0))
    model.embedding[...] = jnp.eye(size)
    qkv = np.zeros((1, size, 2, 3, size), np.float32)
    qkv[0, :, 0] = np.eye(size)[:, None]
    qkv[0, :, 0, 0] = 4 * np.roll(np.eye(size), shift, axis=1)
    blocks = model.blocks
    assert isinstance(blocks, Block)
    blocks.qkv[...] = jnp.asarray(qkv)
    out = np.zeros(blocks.attention_out.shape, np.float32)
    out[0, 0] = np.random.default_rng(1).normal(size=out[0, 0].shape)
    blocks.attention_out[...] = jnp.asarray(out)
    return model


def hidden_strings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text of the tokens below 32, in which three strings of those from 32 on are hidden."""
    random = np.random.default_rng(2)
    text = random.integers(0, 32, 320).astype(np.int32)
    strings = 32 + random.permutation(32)[: 3 * 10].reshape(3, 10).astype(np.int32)
    begins = np.array([20, 150, 290])
    for begin, string in zip(begins, strings, strict=True):
        text[begin : begin + 10] = string
    return text, strings, begins


def test_a_head_that_finds_what_is_copied_has_the_higher_score():
    scores = copy_scores(finding_model(0), *hidden_strings(), shown=2)
    assert scores.shape == (1, 2)
    found, alike = scores[0]
    assert found == pytest.approx(0.5, abs=0.01)  # the token stands in the string, and is the query
    assert alike == pytest.approx(10 / 325, abs=0.001)


@pytest.mark.slow
def test_a_score_is_the_share_of_attention_that_goes_to_the_string():
    """Against the definition, over the text and a string in one sequence at once."""
    model = models.load("random:tiny", unroll=True).model
    random = np.random.default_rng(3)
    text = random.integers(1, 128, 300).astype(np.int32)
    strings, begins = np.stack([text[10:22], text[270:282]]), np.array([10, 270])
    shares = []
    for string, begin in zip(strings, begins, strict=True):
        of_layers = []

        def attend(pool, layer, q, k, v, begin=begin, of_layers=of_layers):
            scores = np.einsum("thd,shd->hts", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1))
            scores = scores.astype(np.float64) * q.shape[-1] ** -0.5
            scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
            weights = np.exp(scores - scores.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
            copying = weights[:, len(text) + 4 - 1 :, begin : begin + 12]
            of_layers.append(copying.sum(axis=2).mean(axis=1))
            wide = np.repeat(v, q.shape[1] // v.shape[1], axis=1)
            return jnp.asarray(np.einsum("hts,shd->thd", weights, wide), jnp.float32), pool

        tokens = np.concatenate([text, string[:-1]])
        model(jnp.asarray(tokens), jnp.arange(len(tokens), dtype=jnp.int32), None, attend)
        shares.append(of_layers)
    expected = np.mean(shares, axis=0).reshape(2, 2, -1).max(axis=2)
    scores = copy_scores(toy_model(), text, strings, begins, shown=4)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("begin", "shown", "words"),
    [(21, 2, "does not stand at 21"), (-1, 2, "does not stand at -1"), (20, 10, "cannot be shown")],
)
def test_strings_that_cannot_be_copied_are_refused(begin, shown, words):
    text, strings, _ = hidden_strings()
    with pytest.raises(ValueError, match=words):
        copy_scores(finding_model(0), text, strings[:1], np.array([begin]), shown=shown)


def training(steps: int = 6, model: Decoder | None = None, **options) -> GateTraining:
    sizes = {"sinks": SINKS, "recent": RECENT}
    return GateTraining(model or toy_model(), steps=steps, **sizes, **options)


def loss_at(values: list[list[float]]):
    """The parts of the loss, and its gradients, with these gates."""
    model = toy_model()
    spec = model.cache_spec
    pattern = HeadPattern.of(np.zeros((2, 2)), SINKS, RECENT)
    streaming = replace(spec, windows=pattern.windows(spec, 0))
    state = gates.Gates(spec)
    state.values[...] = jnp.asarray(values, jnp.float32)
    parts, gradients = gates._loss_and_gradients(
        *nnx.split(model), nnx.state(state), TOKENS, LABELS, streaming, 0.05
    )
    [of_values] = jax.tree.leaves(gradients)
    return tuple(map(float, parts)), np.asarray(of_values)


def last_hidden(model: Decoder) -> np.ndarray:
    """Of the labels, by one dense pass."""

    @jax.jit
    def run(tokens):
        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        pool = empty_pool(model.cache_spec, len(tokens))
        hidden, _ = model(tokens, positions, pool, dense_attend(positions, model.cache_spec))
        return model.normed(hidden)

    return np.asarray(run(jnp.asarray(TOKENS)))[LABELS]


def test_gates_of_none_or_all_are_a_model_with_the_pattern():
    (distance, mean_gate), _ = loss_at([[1, 0], [0, 1]])
    pattern = HeadPattern.of([[1, 0], [0, 1]], SINKS, RECENT)
    apart = last_hidden(with_pattern(toy_model(), pattern, 0.5)) - last_hidden(toy_model())
    assert distance == pytest.approx(np.square(apart).mean(), rel=1e-4)
    assert mean_gate == 0.5
    assert loss_at([[1, 1], [1, 1]])[0] == pytest.approx((0, 1), abs=1e-9)


def test_gradients_are_those_of_the_loss():
    values, step = np.array([[0.3, 0.8], [0.6, 0.1]]), 0.02
    _, gradients = loss_at(values.tolist())
    for place in np.ndindex(2, 2):
        sides = []
        for sign in (1, -1):
            moved = values.copy()
            moved[place] += sign * step
            (distance, mean_gate), _ = loss_at(moved.tolist())
            sides.append(distance + 0.05 * mean_gate)
        slope = (sides[0] - sides[1]) / (2 * step)
        assert gradients[place] == pytest.approx(slope, rel=0.02, abs=1e-5)


def test_gates_of_heads_that_are_not_needed_close():
    """The first KV head finds a token that stood long ago, and the second adds nothing."""
    tokens = np.concatenate([np.arange(48), np.arange(56, 64)]).astype(np.int32)
    labels = np.arange(48, 56, dtype=np.int32)
    learning = training(60, finding_model(32), rate=0.05)
    losses = []
    for _ in range(60):
        loss = learning.step(tokens, labels)
        losses.append(loss.distance + 0.05 * loss.mean_gate)
        assert all(0 <= gate <= 1 for layer in learning.pattern.scores for gate in layer)
    [[needed, not_needed]] = learning.pattern.scores
    assert not_needed == 0
    assert needed > 0.5
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_taken_up_again_goes_on_the_same(tmp_path: Path):
    whole = training()
    for _ in range(2):
        whole.step(TOKENS, LABELS)
    whole.save(tmp_path / "state.npz")
    rest = [whole.step(TOKENS, LABELS) for _ in range(4)]
    again = training()
    again.restore(tmp_path / "state.npz")
    assert [again.step(TOKENS, LABELS) for _ in range(4)] == rest
    assert again.pattern == whole.pattern


def test_a_state_of_another_model_or_none_is_refused(tmp_path: Path):
    training().save(tmp_path / "state.npz")
    with pytest.raises(HeadPatternError, match="not of a training of this model's gates"):
        training(model=finding_model(0)).restore(tmp_path / "state.npz")
    (tmp_path / "state.npz").write_bytes(b"PK")
    for name in ("state.npz", "none.npz"):
        with pytest.raises(HeadPatternError, match=f"{name} cannot be read"):
            training().restore(tmp_path / name)


def test_the_learning_rate_rises_and_falls_by_fifths():
    rate = learning_rate(100, 0.02)
    given = [float(jnp.asarray(rate(step))) for step in (0, 9, 19, 50, 80, 90, 99)]
    np.testing.assert_allclose(given, [0.002, 0.01, 0.02, 0.02, 0.02, 0.01, 0.002], rtol=1e-5)
    assert isinstance(optax.adamw(rate), optax.GradientTransformation)
    assert float(jnp.asarray(learning_rate(1)(0))) == pytest.approx(0.02)
