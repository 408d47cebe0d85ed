"""Log-probabilities over a tree and their gradients, against padded sequences by themselves."""

from __future__ import annotations

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from jax_chunkattn import InvalidWeights, SamplingParams, TokenTree, tree_log_probs
from models.decoder import Decoder
from models.dense_attention import sequence_attend
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import toy_model, windowed_model

RANDOM = np.random.default_rng(0)


def tokens(count):
    return RANDOM.integers(0, 256, count).tolist()


PROMPT, BRANCH = tokens(60), tokens(40)
SEQUENCES = [
    PROMPT + tokens(5),
    PROMPT + BRANCH + tokens(60),
    tokens(30),
    PROMPT + BRANCH + tokens(3),
    PROMPT + tokens(1),
]
SEQUENCES.append(SEQUENCES[1])
BEGINS = [60, 60, 1, 100, 60, 120]
TREE = TokenTree.of(SEQUENCES, BEGINS)
WIDTH, LONGEST = TREE.places.shape[1], max(map(len, SEQUENCES))
WEIGHTS = jnp.asarray(RANDOM.standard_normal(TREE.places.shape), jnp.float32)


@functools.cache
def model_of(name):
    return {
        "toy": toy_model,
        "windows": windowed_model,
        "unrolled": lambda: models.load("random:tiny", unroll=True).model,
    }[name]()


def padded_log_probs(model, params):
    """`[B, L]`: each sequence by itself, with scores of all pairs, and as it is differentiated."""
    graphdef, _ = nnx.split(model)
    rows = np.array([s + [0] * (LONGEST + WIDTH - len(s)) for s in SEQUENCES], np.int32)

    def of_one(row, begin):
        model = nnx.merge(graphdef, params)
        positions = jnp.arange(len(row), dtype=jnp.int32)
        hidden, _ = model(row, positions, None, sequence_attend(model.cache_spec))
        logprobs = jax.nn.log_softmax(model.logits(hidden[:-1]))
        chosen = jnp.take_along_axis(logprobs, row[1:, None], axis=1)[:, 0]
        return jax.lax.dynamic_slice_in_dim(chosen, begin - 1, WIDTH)

    found = jax.vmap(of_one)(jnp.asarray(rows), jnp.asarray(BEGINS, jnp.int32))
    return jnp.where(jnp.asarray(TREE.mask), found, 0)


def value_and_gradients(log_probs, params):
    def loss(params):
        found = log_probs(params)
        return (found * WEIGHTS).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return found, gradients


@functools.cache
def expected(name):
    model = model_of(name)
    return value_and_gradients(functools.partial(padded_log_probs, model), nnx.state(model))


def relative_difference(one, other):
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("toy", {}),
        pytest.param("toy", {"remat": False}, marks=pytest.mark.slow),
        ("windows", {}),
        pytest.param("unrolled", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_log_probabilities_and_gradients_are_those_of_padded_sequences(name, how):
    model = model_of(name)
    wanted, of_wanted = expected(name)
    found, of_found = value_and_gradients(
        lambda params: tree_log_probs(model, params, TREE, **how), nnx.state(model)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    differences = jax.tree.map(relative_difference, of_found, of_wanted)
    assert max(jax.tree.leaves(differences)) < 1e-5, differences


def test_they_are_what_the_engine_sampled_and_scores_by():
    engine = make_engine()
    params = SamplingParams(6, n=3, temperature=1.0, seed=1, logprobs=0)
    groups = list(engine.generate([PROMPT[:20], PROMPT], params))
    samples = [(group.prompt, sample) for group in groups for sample in group.samples]
    tree = TokenTree.of(
        [[*prompt, *sample.tokens] for prompt, sample in samples],
        [len(prompt) for prompt, _ in samples],
    )
    assert tree.num_tokens < len(PROMPT) + 6 * 6 + 1
    model = toy_model()
    found = jax.jit(lambda params: tree_log_probs(model, params, tree))(nnx.state(model))
    for row, (prompt, sample) in zip(found, samples, strict=True):
        sampled = [one.chosen for one in sample.logprobs]
        np.testing.assert_allclose(row, sampled, atol=1e-4)
        [score] = engine.score(prompt, [sample.tokens])
        scored = [one.chosen for one in score.logprobs]
        np.testing.assert_allclose(row, scored, atol=1e-4)


def test_trees_of_one_kind_share_a_program_and_a_step_makes_samples_likelier():
    model = toy_model()
    optimiser = optax.sgd(0.1)

    @chex.assert_max_traces(1)
    def step(params, moments, tree):
        def loss(params):
            return -tree_log_probs(model, params, tree).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimiser.update(gradients, moments, params)
        return value, optax.apply_updates(params, updates), moments

    jitted = jax.jit(step)
    params, moments = nnx.state(model), optimiser.init(nnx.state(model))
    losses = []
    for count in (3, 3, 3, 5):
        answers = [PROMPT[:10] + [7] * count, [*PROMPT[:10], 9, 8]]
        tree = TokenTree.of(answers, [10, 10], width=6)
        value, params, moments = jitted(params, moments, tree)
        losses.append(float(value))
    assert losses[0] > losses[1] > losses[2]


def temporary_bytes(model, tree, **how):
    def loss(params, tree):
        return tree_log_probs(model, params, tree, **how).sum()

    step = jax.jit(jax.grad(loss)).lower(nnx.state(model), tree).compile()
    analysis = step.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.optimised
def test_the_backward_pass_keeps_little_of_a_layer():
    """For each layer of 512 tokens: what it was given, and the output of attention with a number
    for each head; with everything kept, much more."""
    tree = TokenTree.of([tokens(500)])
    assert len(tree.tokens) == 512

    def a_layer(**how):
        configs = (replace(config, num_layers=count) for count in (2, 6))
        decoders = (Decoder(config, rngs=nnx.Rngs(0)) for config in configs)
        few, more = (temporary_bytes(decoder, tree, **how) for decoder in decoders)
        return (more - few) / 4 / 512

    config = toy_model().config
    kept = 4 * (config.hidden_size + config.num_heads * (config.head_dim + 1))
    assert kept <= a_layer() <= 1.5 * kept
    assert a_layer(remat=False) > 3 * kept


@pytest.mark.slow
@pytest.mark.optimised
def test_a_long_prompt_costs_no_memory_for_logits():
    """Five more blocks none of which is asked for: as with a small vocabulary."""

    def growth(vocabulary):
        config = replace(toy_model().config, vocab_size=vocabulary, num_layers=1)
        model = Decoder(config, rngs=nnx.Rngs(0))
        trees = (TokenTree.of([tokens(length)], [length - 10]) for length in (300, 1024))
        short, long = (temporary_bytes(model, tree) for tree in trees)
        return long - short

    large = 1 << 14
    of_unembedding = 4 * large * toy_model().config.hidden_size
    assert growth(large) - growth(256) < of_unembedding / 4


def test_weights_of_another_model_are_refused():
    config = replace(toy_model().config, num_layers=3)
    other = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(InvalidWeights, match="has the shape"):
        tree_log_probs(toy_model(), other, TREE)
    with pytest.raises(InvalidWeights, match="weights do not fit the model: there is no"):
        tree_log_probs(toy_model(), {"embedding": other["embedding"]}, TREE)


def test_an_implementation_that_is_not_known_is_refused():
    model = toy_model()
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        tree_log_probs(model, nnx.state(model), TREE, implementation="fast")


@pytest.mark.parametrize("sequence", [[1, 256], [1] * 1025])
def test_what_the_model_does_not_have_makes_all_nan(sequence):
    model = toy_model()
    tree = TokenTree.of([sequence, [1, 2]], min_tokens=1025)
    found = jax.jit(lambda params, tree: tree_log_probs(model, params, tree))
    [row, *_] = found(nnx.state(model), tree)
    assert np.isnan(row[0])
    fine = TokenTree.of([[1, 255], [1, 2]], width=tree.places.shape[1], min_tokens=1025)
    assert np.isfinite(found(nnx.state(model), fine)).all()
