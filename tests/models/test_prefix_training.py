"""Training a prefix to stand for a prompt: the definition of what it learns, and that it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import CheckpointError
from models.prefix_training import PrefixTraining
from tests.jax_chunkattn.engine.behind import logits_behind
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import logits_without_cache, token_tree, toy_model

[PROMPT] = token_tree((1, 48), seed=4)
ANSWERED = [
    (question, answer[: 3 + 2 * number])
    for number, (question, answer) in enumerate(
        zip(token_tree((4, 5), seed=5), token_tree((4, 9), seed=6), strict=True)
    )
]
STEPS, TOKENS = 120, 16


def make_training() -> PrefixTraining:
    return PrefixTraining(toy_model(), PROMPT, TOKENS, steps=STEPS, warmup=2, rate=0.05)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


def divergence_by_the_definition(prefix, answered) -> float:
    """Over whole sequences, by a model with the prompt and by one behind the prefix."""
    apart = []
    for question, answer in answered:
        tokens = (*question, *answer)
        places = slice(len(question) - 1, len(tokens) - 1)
        theirs = logits_without_cache((*PROMPT, *tokens))[len(PROMPT) :][places]
        ours = logits_behind((prefix.keys, prefix.values), tokens)[places]
        expected, found = log_softmax(theirs), log_softmax(ours)
        apart.extend((np.exp(expected) * (expected - found)).sum(axis=1))
    return float(np.mean(apart))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training that was saved half-way, the examples, and the losses."""
    training = make_training()
    examples = training.examples(ANSWERED)
    first, losses = training.prefix, []
    path = tmp_path_factory.mktemp("training") / "half.npz"
    for step in range(STEPS):
        if step == STEPS // 2:
            training.save(path)
        losses.append(training.step(examples))
    return training, examples, first, losses, path


def test_it_begins_as_the_prompts_first_tokens(trained):
    _, _, first, _, _ = trained
    [question, answer] = ANSWERED[-1]
    tokens = (*PROMPT[:TOKENS], *question, *answer)
    np.testing.assert_allclose(
        logits_behind((first.keys, first.values), tokens[TOKENS:]),
        logits_without_cache(tokens)[TOKENS:],
        atol=1e-4,
    )


def test_what_it_learns_is_the_divergence_of_its_definition(trained):
    training, examples, first, losses, _ = trained
    assert losses[0] == pytest.approx(divergence_by_the_definition(first, ANSWERED), rel=1e-3)
    now = training.divergence(examples)
    assert now == pytest.approx(divergence_by_the_definition(training.prefix, ANSWERED), rel=1e-3)
    assert now < losses[0] / 10


def test_some_examples_are_those_of_their_indices(trained):
    training, examples, _, _, _ = trained
    some = training.divergence(examples.take([2, 0]))
    expected = divergence_by_the_definition(training.prefix, [ANSWERED[2], ANSWERED[0]])
    assert some == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_was_saved_goes_on_the_same(trained, tmp_path):
    training, examples, _, losses, path = trained
    again = make_training()
    again.restore(path)
    assert [again.step(examples) for _ in range(STEPS // 2)] == losses[STEPS // 2 :]
    np.testing.assert_array_equal(again.prefix.keys, training.prefix.keys)
    other = PrefixTraining(toy_model(), PROMPT, 8, steps=1, warmup=0, rate=0.1)
    with pytest.raises(CheckpointError, match="not of a prefix of these sizes"):
        other.restore(path)
    with pytest.raises(ValueError, match="64 virtual tokens cannot begin"):
        PrefixTraining(toy_model(), PROMPT, 64, steps=1, warmup=0, rate=0.1)


def test_an_engine_that_serves_it_says_what_it_says_behind_the_prompt(trained):
    training, _, first, _, _ = trained
    apart = {}
    with make_engine() as engine:
        for name, prefix in (("first", first), ("trained", training.prefix)):
            engine.add_prefix(name, prefix.keys, prefix.values)
            found = []
            for question, answer in ANSWERED:
                [ours] = engine.score(question, [answer], learned=name)
                [theirs] = engine.score([*PROMPT, *question], [answer])
                found.append(abs(ours.total - theirs.total))
            apart[name] = sum(found)
    assert apart["trained"] < apart["first"] / 3
