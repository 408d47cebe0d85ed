"""Tokens and their probabilities are what they are by definition, compiled or not, and whether
parameters lie on the host or on the device. Logits, positions and counts are on the device."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.sampling import (
    MAX_LOGPROBS,
    RowSampling,
    SamplingParams,
    TokenCounts,
    log_probabilities,
    sample,
)
from tests.jax_chunkattn.sampling.sampling_oracle import VOCABULARY, Row, expected_token
from tests.variants import VariantsTestCase, every_way

PARAMS = [
    SamplingParams(logprobs=0),
    SamplingParams(temperature=1.0, seed=1, top_k=10, top_p=0.8, min_p=0.05, logprobs=3),
    SamplingParams(logit_bias={3: 7.0, 5: -2.0}),
    SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, logprobs=MAX_LOGPROBS),
]
POSITIONS = np.array([3, 70, 5, 1], np.int32)
PROMPT = np.zeros((4, VOCABULARY), bool)
GENERATED = np.zeros((4, VOCABULARY), np.int32)
PROMPT[:, :6], GENERATED[:, 4:12] = True, 2
LOGITS = np.random.default_rng(0).integers(-16, 17, (4, VOCABULARY)).astype(np.float32) / 4


class SamplingVariants(VariantsTestCase):
    @every_way
    def test_every_row_gets_the_token_of_the_definitions(self):
        @self.variant
        def choose(logits, rows, positions, prompt, generated):
            counts = TokenCounts(jnp.asarray(prompt), jnp.asarray(generated))
            return sample(jnp.asarray(logits), rows, jnp.asarray(positions), lambda: counts)

        got = choose(LOGITS, RowSampling.stack(PARAMS, 4), POSITIONS, PROMPT, GENERATED)
        seen = tuple(range(6)), tuple(token for token in range(4, 12) for _ in range(2))
        expected = [
            expected_token(Row(logits, params, *seen, int(position)))
            for logits, params, position in zip(LOGITS, PARAMS, POSITIONS, strict=True)
        ]
        chex.assert_trees_all_equal(got, np.array(expected, np.int32), strict=True)

    @every_way
    def test_every_row_gets_the_log_probabilities_it_asks_for(self):
        tokens = np.array([9, 0, 23, 4], np.int32)

        @self.variant
        def report(logits, tokens, rows):
            return log_probabilities(jnp.asarray(logits), jnp.asarray(tokens), rows.logprobs)

        got = report(LOGITS, tokens, RowSampling.stack(PARAMS, 4))
        exact = LOGITS.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        asked = np.array([[0], [3], [0], [MAX_LOGPROBS]]) > np.arange(MAX_LOGPROBS)
        order = np.argsort(-LOGITS, axis=1, kind="stable")[:, :MAX_LOGPROBS]
        chosen = np.where([True, True, False, True], exact[np.arange(4), tokens], 0)
        ranked = np.take_along_axis(exact, order, axis=1)
        chex.assert_trees_all_equal(got.top_tokens, np.where(asked, order, -1))
        chex.assert_trees_all_close(
            (got.chosen, got.top_values), (chosen, np.where(asked, ranked, 0)), rtol=0, atol=1e-5
        )
