from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn import sampling
from jax_chunkattn.sampling import RowSampling, SamplingParams, TokenCounts
from tests.effort import examples
from tests.jax_chunkattn.sampling import sampling_oracle
from tests.jax_chunkattn.sampling.sampling_oracle import ROWS, OnTheEdge, Row, expected_token

VOCABULARY = 64
DRAWS = 2000
sample = jax.jit(sampling.sample)


@jax.jit
def sample_with_counts(logits, rows, positions, counts):
    return sampling.sample(logits, rows, positions, lambda: counts)


def logits_of(probabilities):
    """A row whose softmax is `probabilities`, in random order, and that order."""
    order = np.random.default_rng(0).permutation(len(probabilities))
    row = np.zeros(len(probabilities), np.float32)
    row[order] = np.log(probabilities)
    return row, order


def counts_of(rows, vocabulary):
    """The token counts of rows of an oracle."""
    prompt = np.zeros((len(rows), vocabulary), bool)
    generated = np.zeros((len(rows), vocabulary), np.int32)
    for index, row in enumerate(rows):
        prompt[index, list(row.prompt)] = True
        np.add.at(generated[index], list(row.generated), 1)
    return TokenCounts(jnp.asarray(prompt), jnp.asarray(generated))


def sample_rows(rows):
    """The tokens of a batch."""
    return np.asarray(
        sample_with_counts(
            jnp.asarray(np.stack([row.logits for row in rows])),
            RowSampling.stack([row.params for row in rows], len(rows)),
            jnp.asarray(np.array([row.position for row in rows], np.int32)),
            counts_of(rows, len(rows[0].logits)),
        )
    ).tolist()


def greedy_choice(logits, *, prompt=(), generated=(), **options):
    row = Row(np.array(logits, np.float32), SamplingParams(**options), prompt, generated)
    [token] = sample_rows([row])
    return token


def draw(row, params, times=1):
    """`DRAWS` draws, `times` over, all at different positions; by one program for all tests."""
    impossible = np.full(VOCABULARY - len(row), -np.inf, np.float32)
    rows = jnp.asarray(np.tile(np.append(row, impossible), (DRAWS, 1)))
    stacked = RowSampling.stack([replace(params, seed=0)] * DRAWS, DRAWS)
    positions = np.arange(times * DRAWS, dtype=np.int32).reshape(times, DRAWS)
    return np.concatenate([sample(rows, stacked, jnp.asarray(each)) for each in positions])


@pytest.fixture(scope="module")
def geometric():
    weights = 0.7 ** np.arange(VOCABULARY)
    return weights / weights.sum()


def test_temperature_zero_takes_the_likeliest(geometric):
    row, order = logits_of(geometric)
    assert set(draw(row, SamplingParams())) == {order[0]}


def test_draws_follow_the_distribution(geometric):
    row, order = logits_of(geometric)
    drawn = draw(row, SamplingParams(temperature=1.0), 2)
    shares = np.array([(drawn == token).mean() for token in order])
    # Four standard deviations of a share over 4,000 draws are at most 0.032.
    chex.assert_trees_all_close(shares, geometric, rtol=0, atol=0.032)


def test_temperature_sharpens_and_flattens(geometric):
    row, order = logits_of(geometric)
    shares = [
        (draw(row, SamplingParams(temperature=t)) == order[0]).mean() for t in (0.5, 1.0, 2.0)
    ]
    expected = [geometric[0] ** (1 / t) / (geometric ** (1 / t)).sum() for t in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(shares, expected, atol=0.045)


@pytest.mark.parametrize("k", [1, 2, 7, VOCABULARY, 1000])
def test_top_k_keeps_the_k_likeliest(geometric, k):
    row, order = logits_of(geometric)
    drawn = draw(row, SamplingParams(temperature=30.0, top_k=k), 2)
    assert set(drawn) == set(order[:k])


@pytest.mark.parametrize("p", [1e-6, 0.29, 0.31, 0.6, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_p(geometric, p):
    row, order = logits_of(geometric)
    size = int(np.searchsorted(np.cumsum(geometric), p)) + 1
    drawn = draw(row, SamplingParams(temperature=1.0, top_p=p), 3)
    assert set(drawn) == set(order[:size])


def test_top_p_counts_what_top_k_left(geometric):
    row, order = logits_of(geometric)
    kept = geometric[:4] / geometric[:4].sum()
    size = int(np.searchsorted(np.cumsum(kept), 0.7)) + 1
    assert size < int(np.searchsorted(np.cumsum(geometric), 0.7)) + 1
    drawn = draw(row, SamplingParams(temperature=1.0, top_k=4, top_p=0.7))
    assert set(drawn) == set(order[:size])


def test_ties_with_the_last_of_top_k_are_kept():
    row = np.array([3, 1, 1, 1, 0], np.float32)
    drawn = draw(row, SamplingParams(temperature=5.0, top_k=2))
    assert set(drawn) == {0, 1, 2, 3}


def test_rows_follow_their_own_rules_and_seeds(geometric):
    row, order = logits_of(geometric)
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, seed=2),
        SamplingParams(temperature=1.0, seed=1),
    ]
    rows = jnp.asarray(np.tile(row, (4, 1)))
    columns = np.stack(
        [
            np.asarray(sample(rows, RowSampling.stack(params, 4), jnp.full(4, i, jnp.int32)))
            for i in range(40)
        ]
    )
    assert (columns[:, 0] == order[0]).all()
    assert (columns[:, 1] == columns[:, 3]).all()
    assert (columns[:, 1] != columns[:, 2]).any()
    assert len(set(columns[:, 1])) > 3


def test_a_top_p_that_rounding_never_reaches_keeps_to_top_k():
    random = np.random.default_rng(0)
    logits = random.standard_normal((2000, VOCABULARY), np.float32)
    params = SamplingParams(
        temperature=100.0, top_k=10, top_p=float(np.nextafter(np.float32(1), 0)), seed=0
    )
    rows = RowSampling.stack([params] * 2000, 2000)
    drawn = sample(jnp.asarray(logits), rows, jnp.arange(2000, dtype=jnp.int32))
    rank = (logits > logits[np.arange(2000), np.asarray(drawn)][:, None]).sum(axis=1)
    assert rank.max() == 9


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 1.0])
def test_min_p_keeps_tokens_by_their_share_of_the_likeliest(geometric, p):
    """What is left is drawn in its own proportions."""
    row, order = logits_of(geometric)
    size = int((geometric >= p * geometric[0]).sum())
    drawn = draw(row, SamplingParams(temperature=1.0, min_p=p), 2)
    shares = np.array([(drawn == token).mean() for token in order])
    expected = np.where(np.arange(VOCABULARY) < size, geometric, 0)
    chex.assert_trees_all_close(shares, expected / expected.sum(), rtol=0, atol=0.032)
    assert not shares[size:].any()


def test_min_p_keeps_a_likeliest_token_whose_logit_is_minus_zero():
    drawn = draw(np.array([-1, -0.0, -2], np.float32), SamplingParams(temperature=1, min_p=1))
    assert set(drawn) == {1}


def test_min_p_counts_after_temperature(geometric):
    row, order = logits_of(geometric)
    for temperature in (0.5, 1.0, 3.0):
        size = int(
            (geometric ** (1 / temperature) >= 0.3 * geometric[0] ** (1 / temperature)).sum()
        )
        drawn = draw(row, SamplingParams(temperature=temperature, min_p=0.3))
        assert set(drawn) == set(order[:size])


ALONE = Row(np.zeros(sampling_oracle.VOCABULARY, np.float32), SamplingParams())


@settings(max_examples=examples(60, 200), deadline=None)
@given(st.lists(ROWS, min_size=4, max_size=4))
def test_every_row_is_sampled_by_the_definitions_whatever_the_others_ask(rows):
    together = sample_rows(rows)
    alone = [sample_rows([row, ALONE, ALONE, ALONE])[0] for row in rows]
    assert together == alone
    for row, token in zip(rows, together, strict=True):
        with suppress(OnTheEdge):
            assert token == expected_token(row)


def test_draws_stay_what_they_were():
    """A seed answers the same in every version."""
    logits = jnp.asarray(np.tile(np.sin(np.arange(64, dtype=np.float32)) * 3, (7, 1)))
    params = [
        *(SamplingParams(temperature=1.0, seed=seed) for seed in (0, 1, 2**32 - 1)),
        SamplingParams(temperature=0.5, seed=7, top_k=9),
        SamplingParams(temperature=2.0, seed=7, top_p=0.8),
        SamplingParams(temperature=1.5, seed=7, top_k=20, top_p=0.6),
        SamplingParams(),
    ]
    first, second = (
        sample(logits, RowSampling.stack(params, 7), jnp.full(7, position, jnp.int32)).tolist()
        for position in (0, 1000)
    )
    assert first == [33, 52, 58, 27, 27, 27, 33]
    assert second == [1, 1, 40, 39, 39, 39, 33]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_any_precision_are_sampled_as_float32(dtype, geometric):
    logits = jnp.asarray(np.tile(np.log(geometric), (8, 1)), dtype)
    params = [SamplingParams(temperature=t, seed=0, logit_bias={1: 0.01}) for t in (0.0, 1.0)] * 4
    rows, positions = RowSampling.stack(params, 8), jnp.arange(8, dtype=jnp.int32)
    assert (
        sample(logits, rows, positions).tolist()
        == sample(logits.astype(jnp.float32), rows, positions).tolist()
    )


def test_greedy_ties_go_to_the_smallest_id():
    assert greedy_choice([1, 5, 5, 2]) == 1


def test_a_bias_changes_the_greedy_choice():
    assert greedy_choice([1, 2, 3, 0]) == 2
    assert greedy_choice([1, 2, 3, 0], logit_bias={0: 2.5}) == 0
    assert greedy_choice([1, 2, 3, 0], logit_bias={2: -1.5}) == 1
    assert greedy_choice([1, 2, 3, 0], logit_bias={0: 100, 3: 100}) == 0


def test_biases_beyond_the_vocabulary_are_dropped():
    """`check_vocabulary` refuses them; on the device they must not fall on another token."""
    assert greedy_choice([1, 2, 3, 0], logit_bias={4: 100.0, 7: 100.0, 2**31 - 2: 100.0}) == 2


def test_a_token_may_be_forbidden_to_a_drawing_row():
    row = np.zeros(4, np.float32)
    drawn = draw(row, SamplingParams(temperature=1.0, logit_bias={2: -100.0}))
    assert set(drawn) == {0, 1, 3}


def test_repetition_penalty_is_for_tokens_of_the_prompt_and_of_the_answer():
    logits = [2, 3, 4, 1]
    assert greedy_choice(logits, repetition_penalty=1.5, prompt=(2,)) == 1
    assert greedy_choice(logits, repetition_penalty=1.5, generated=(2, 2)) == 1
    assert greedy_choice(logits, repetition_penalty=1.5, prompt=(2, 1), generated=(2,)) == 2
    assert greedy_choice(logits, repetition_penalty=2.0, prompt=(2, 1)) == 0 != 2


def test_repetition_penalty_makes_negative_logits_smaller():
    logits = [-3, -2, -5, -4]
    assert greedy_choice(logits, repetition_penalty=1.2, prompt=(1,)) == 1
    assert greedy_choice(logits, repetition_penalty=1.6, prompt=(1,)) == 0


def test_repetition_penalty_goes_by_the_sign_after_the_bias():
    assert greedy_choice([-1.0, 1.0], repetition_penalty=2.0, prompt=(0,)) == 1
    options = {"repetition_penalty": 4.0, "logit_bias": {0: 3.0}, "prompt": (0,)}
    assert greedy_choice([-1.0, 0.25], **options) == 0
    assert greedy_choice([-1.0, 0.75], **options) == 1


def test_frequency_penalty_grows_with_each_occurrence_in_the_answer():
    logits = [3, 1.8, 0, 0]
    options = {"frequency_penalty": 0.5}
    assert greedy_choice(logits, generated=(0, 0), **options) == 0
    assert greedy_choice(logits, generated=(0, 0, 0), **options) == 1
    assert greedy_choice(logits, prompt=(0, 0, 0), **options) == 0


def test_presence_penalty_is_taken_once():
    logits = [3, 1.8, 0, 0]
    assert greedy_choice(logits, generated=(0,), presence_penalty=1.5) == 1
    assert greedy_choice(logits, generated=(0,) * 5, presence_penalty=1.0) == 0
    assert greedy_choice(logits, prompt=(0,), presence_penalty=1.5) == 0


def test_negative_penalties_favour_what_was_generated():
    assert greedy_choice([3, 2, 0, 0], generated=(1,), presence_penalty=-1.5) == 1
    assert greedy_choice([3, 2, 0, 0], generated=(1, 1), frequency_penalty=-0.75) == 1


def test_penalties_change_what_is_drawn():
    row = np.zeros(4, np.float32)
    params = SamplingParams(temperature=0.05, seed=0, presence_penalty=2.0)
    rows = [
        Row(row, params, prompt=(0,), generated=(1, 3), position=position)
        for position in range(100)
    ]
    assert set(sample_rows(rows)) == {0, 2}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-29},
        {"temperature": 1e-37},
        {"temperature": 1e-320},
        {"temperature": 1.0, "top_p": 1e-44},
        {"temperature": 1.0, "top_p": 1e-320},
        {"temperature": 1.0, "min_p": 1.0},
    ],
)
def test_numbers_too_small_for_float32_take_the_likeliest(options, geometric):
    row, order = logits_of(geometric)
    assert set(draw(row + 100, SamplingParams(**options))) == {order[0]}


NO_NUMBERS = {
    "a NaN": [1, np.nan, 3, 0],
    "a NaN in front": [np.nan, 1, 3, 0],
    "all NaN": [np.nan] * 4,
    "an infinity": [1, np.inf, 3, 0],
    "no token possible": [-np.inf] * 4,
}
OF_EVERY_KIND = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, seed=2, top_k=2, top_p=0.9, min_p=0.1),
    SamplingParams(logit_bias={0: 3.0}),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5),
]


@pytest.mark.parametrize("logits", NO_NUMBERS.values(), ids=list(NO_NUMBERS))
def test_no_token_is_chosen_where_logits_are_no_numbers(logits):
    """Whatever the row asks for, and whatever the rows beside it; those are not disturbed."""
    good = np.array([1, 2, -np.inf, 0], np.float32)
    for params in OF_EVERY_KIND:
        rows = [Row(np.array(logits, np.float32), params, (1,), (2,))]
        beside = [Row(good, params, (1,), (2,)) for _ in range(3)]
        tokens = sample_rows([*rows, *beside])
        assert tokens[0] == sampling.NO_CHOICE < 0
        assert tokens[1:] == sample_rows(beside + beside[:1])[:3]
        assert min(tokens[1:]) >= 0
