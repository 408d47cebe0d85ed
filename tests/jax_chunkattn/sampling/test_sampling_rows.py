from __future__ import annotations

from dataclasses import fields

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.sampling import (
    MAX_BIASED_TOKENS,
    MAX_DEFAULT_STOP_TOKENS,
    MAX_STOP_TOKENS,
    RowSampling,
    SamplingParams,
    TokenCounts,
    log_probabilities,
    sample,
)

PARAMS = [
    SamplingParams(temperature=0.5, top_k=3, top_p=0.9, seed=2**32 - 1, min_p=0.25),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5),
    SamplingParams(logit_bias={7: 1.5, 2: -3.0}, stop_token_ids=[8, 9], logprobs=5),
    SamplingParams(stop_token_ids=[8], ignore_eos=True, logprobs=0),
]


def named(tokens):
    """The tokens of a row that are not padding."""
    return {int(token) for token in tokens if 0 <= token < 2**31 - 1}


def test_stacking_keeps_each_row_and_pads_with_greedy_ones():
    rows = RowSampling.stack(PARAMS, 6)
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        expected = [getattr(params, name) for params in [*PARAMS, SamplingParams()]]
        np.testing.assert_allclose(getattr(rows, name)[:5], expected, rtol=1e-6)
    np.testing.assert_array_equal(rows.seed, [2**32 - 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows.logprobs, [-1, -1, 5, 0, -1, -1])
    assert [named(tokens) for tokens in rows.bias_tokens] == [set()] * 2 + [{2, 7}] + [set()] * 3
    biases = dict(zip(rows.bias_tokens[2].tolist(), rows.bias_values[2].tolist(), strict=True))
    assert (biases[7], biases[2]) == (1.5, -3.0)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[4:], rows), jax.tree.map(lambda x: x, RowSampling.stack([], 2))
    )


def test_a_row_that_draws_needs_a_seed():
    with pytest.raises(ValueError, match="a row with a temperature needs a seed"):
        RowSampling.stack([SamplingParams(temperature=0.5)], 1)


def test_an_engines_stop_tokens_end_all_rows_but_those_that_ignore_them():
    rows = RowSampling.stack(PARAMS, 5, stop_tokens=[1, 8])
    assert [named(tokens) for tokens in rows.stop_tokens] == [
        {1, 8},
        {1, 8},
        {1, 8, 9},
        {8},
        {1, 8},
    ]


def test_shapes_and_types_do_not_depend_on_what_is_asked():
    plain = RowSampling.stack([], 4)
    full = RowSampling.stack(
        [
            SamplingParams(
                logit_bias=dict.fromkeys(range(MAX_BIASED_TOKENS), 1.0),
                stop_token_ids=range(MAX_STOP_TOKENS),
            )
        ],
        4,
        stop_tokens=range(100, 100 + MAX_DEFAULT_STOP_TOKENS),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, full)
    assert all(isinstance(getattr(full, field.name), np.ndarray) for field in fields(full))
    assert named(full.bias_tokens[0]) == set(range(MAX_BIASED_TOKENS))
    assert len(named(full.stop_tokens[0])) == MAX_STOP_TOKENS + MAX_DEFAULT_STOP_TOKENS


def test_nothing_that_rows_ask_for_has_a_program_traced_again():
    choose = jax.jit(chex.assert_max_traces(sample, n=1))
    report = jax.jit(chex.assert_max_traces(log_probabilities, n=1))
    logits, integers = jnp.zeros((4, 16)), jnp.zeros(4, jnp.int32)
    for params in ([], *([one] for one in PARAMS), PARAMS):
        for stop_tokens in ([], [1, 8]):
            rows = RowSampling.stack(params, 4, stop_tokens)
            choose.eval_shape(logits, rows, integers)
            report.eval_shape(logits, integers, rows.logprobs)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 sampling parameters do not fit 3 rows"):
        RowSampling.stack(PARAMS, 3)
    with pytest.raises(ValueError, match="at most 16 stop tokens, got 17"):
        RowSampling.stack(PARAMS, 4, stop_tokens=range(17))


def test_slots_outside_the_table_are_greedy_rows():
    table = RowSampling.stack(PARAMS, 4, stop_tokens=[1])
    slots = np.array([2, 4, 0, -1, 2**31 - 1, 3], np.int32)
    taken = jax.jit(RowSampling.take)(table, slots)
    greedy = RowSampling.stack([], 1)
    for row, slot in enumerate(slots):
        expected = jax.tree.map(lambda x, slot=int(slot): x[slot : slot + 1], table)
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, row=row: x[row : row + 1], taken),
            jax.tree.map(jnp.asarray, expected if 0 <= slot < 4 else greedy),
        )


def test_slots_outside_the_table_have_seen_no_token():
    counts = TokenCounts(jnp.ones((3, 5), bool), jnp.full((3, 5), 2, jnp.int32))
    taken = jax.jit(TokenCounts.take)(counts, np.array([-1, 2, 3, 0], np.int32))
    np.testing.assert_array_equal(taken.prompt, [[False] * 5, [True] * 5] * 2)
    np.testing.assert_array_equal(taken.generated, [[0] * 5, [2] * 5] * 2)
