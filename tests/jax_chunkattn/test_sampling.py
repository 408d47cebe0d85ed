from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import sampling
from jax_chunkattn.sampling import RowSampling, SamplingParams

VOCABULARY = 64
sample = jax.jit(sampling.sample)


def logits_of(probabilities):
    """A row whose softmax is `probabilities`, in random order, and that order."""
    order = np.random.default_rng(0).permutation(len(probabilities))
    row = np.zeros(len(probabilities), np.float32)
    row[order] = np.log(probabilities)
    return row, order


def draw(row, params, count):
    """`count` draws at different positions."""
    rows = jnp.asarray(np.tile(row, (count, 1)))
    positions = jnp.arange(count, dtype=jnp.int32)
    return np.asarray(sample(rows, RowSampling.stack([params] * count, count), positions))


@pytest.fixture(scope="module")
def geometric():
    weights = 0.7 ** np.arange(VOCABULARY)
    return weights / weights.sum()


def test_temperature_zero_takes_the_likeliest(geometric):
    row, order = logits_of(geometric)
    assert set(draw(row, SamplingParams(), 20)) == {order[0]}


def test_draws_follow_the_distribution(geometric):
    row, order = logits_of(geometric)
    drawn = draw(row, SamplingParams(temperature=1.0), 4000)
    shares = np.array([(drawn == token).mean() for token in order])
    # Four standard deviations of a share over 4,000 draws are at most 0.032.
    np.testing.assert_allclose(shares, geometric, atol=0.032)


def test_temperature_sharpens_and_flattens(geometric):
    row, order = logits_of(geometric)
    shares = [
        (draw(row, SamplingParams(temperature=t), 2000) == order[0]).mean() for t in (0.5, 1.0, 2.0)
    ]
    expected = [geometric[0] ** (1 / t) / (geometric ** (1 / t)).sum() for t in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(shares, expected, atol=0.045)


@pytest.mark.parametrize("k", [1, 2, 7, VOCABULARY, 1000])
def test_top_k_keeps_the_k_likeliest(geometric, k):
    row, order = logits_of(geometric)
    drawn = draw(row, SamplingParams(temperature=30.0, top_k=k), 3000)
    assert set(drawn) == set(order[:k])


@pytest.mark.parametrize("p", [1e-6, 0.29, 0.31, 0.6, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_p(geometric, p):
    row, order = logits_of(geometric)
    size = int(np.searchsorted(np.cumsum(geometric), p)) + 1
    drawn = draw(row, SamplingParams(temperature=1.0, top_p=p), 6000)
    assert set(drawn) == set(order[:size])


def test_top_p_counts_what_top_k_left(geometric):
    row, order = logits_of(geometric)
    kept = geometric[:4] / geometric[:4].sum()
    size = int(np.searchsorted(np.cumsum(kept), 0.7)) + 1
    assert size < int(np.searchsorted(np.cumsum(geometric), 0.7)) + 1
    drawn = draw(row, SamplingParams(temperature=1.0, top_k=4, top_p=0.7), 2000)
    assert set(drawn) == set(order[:size])


def test_ties_with_the_last_of_top_k_are_kept():
    row = np.array([3, 1, 1, 1, 0], np.float32)
    drawn = draw(row, SamplingParams(temperature=5.0, top_k=2), 500)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"temperature": float("inf")}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0"),
        ({"seed": -1}, "seed must fit 32 bits"),
        ({"seed": 2**32}, "seed must fit 32 bits"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
