from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn import sampling
from jax_chunkattn.sampling import MAX_LOGPROBS, Logprobs, RowSampling, SamplingParams

log_probabilities = jax.jit(sampling.log_probabilities)
ROWS, VOCABULARY = 4, 32


def report(logits, tokens, asked):
    params = [SamplingParams(logprobs=number) for number in asked]
    rows = RowSampling.stack(params, len(params))
    return log_probabilities(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32), rows.logprobs)


def check(logits, tokens, asked):
    """Against the definition, in float64."""
    result = report(logits, tokens, asked)
    exact = np.asarray(logits, np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen = np.zeros(len(asked), np.float32)
    top_tokens = np.full((len(asked), MAX_LOGPROBS), -1, np.int32)
    top_values = np.zeros((len(asked), MAX_LOGPROBS), np.float32)
    for row, number in enumerate(asked):
        if number is not None:
            chosen[row] = exact[row, tokens[row]]
        order = np.argsort(-np.asarray(logits[row]), kind="stable")[: number or 0]
        top_tokens[row, : len(order)] = order
        top_values[row, : len(order)] = exact[row, order]
    expected = Logprobs(*map(jnp.asarray, (chosen, top_tokens, top_values)))
    chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
    chex.assert_trees_all_close(result, expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_equal(result.top_tokens, expected.top_tokens)
    assert not np.asarray(result.top_values)[top_tokens < 0].any()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    step=st.sampled_from([0.0, 0.5]),
    tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=ROWS, max_size=ROWS),
    asked=st.lists(
        st.one_of(st.none(), st.integers(0, MAX_LOGPROBS)), min_size=ROWS, max_size=ROWS
    ),
)
def test_every_row_gets_what_it_asks_for(seed, step, tokens, asked):
    """Logits on a grid tie: the smaller id comes first. None is -0.0, which ranks behind 0.0."""
    logits = 3 * np.random.default_rng(seed).standard_normal((ROWS, VOCABULARY), np.float32)
    if step:
        logits = np.round(logits / step) * np.float32(step) + np.float32(0)
    check(logits, tokens, asked)


@pytest.mark.parametrize("vocabulary", [1, 7, MAX_LOGPROBS, MAX_LOGPROBS + 1])
def test_small_vocabularies(vocabulary):
    logits = np.random.default_rng(0).standard_normal((3, vocabulary), np.float32)
    check(logits, [0, vocabulary - 1, 0], [20, 5, None])


def test_they_are_the_models_own_whatever_the_tokens_were_chosen_with():
    logits = np.random.default_rng(0).standard_normal((2, VOCABULARY), np.float32)
    plain = SamplingParams(logprobs=3)
    params = SamplingParams(
        temperature=3.0,
        seed=0,
        top_k=1,
        top_p=0.1,
        min_p=0.5,
        repetition_penalty=2.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias={5: 100.0},
        logprobs=3,
    )
    tokens = jnp.array([5, 5], jnp.int32)
    result, same = (
        log_probabilities(jnp.asarray(logits), tokens, RowSampling.stack(rows, 2).logprobs)
        for rows in ([plain, params], [plain, plain])
    )
    chex.assert_trees_all_equal(result, same)


def test_the_greedy_token_is_the_first_of_the_likeliest():
    logits = np.random.default_rng(1).standard_normal((ROWS, VOCABULARY), np.float32)
    tokens = logits.argmax(axis=1)
    result = report(logits, tokens, [1] * ROWS)
    np.testing.assert_array_equal(result.top_tokens[:, 0], tokens)
    chex.assert_trees_all_equal(result.top_values[:, 0], result.chosen)


def test_large_logits_and_low_precision_overflow_nothing():
    logits = jnp.asarray([[3e4, -3e4, 0.0]], jnp.bfloat16)
    result = report(logits, [1], [3])
    np.testing.assert_array_equal(result.top_tokens[0, :3], [0, 2, 1])
    np.testing.assert_allclose(result.chosen, [-6e4], rtol=1e-2)
    chex.assert_type([result.chosen, result.top_values], jnp.float32)
