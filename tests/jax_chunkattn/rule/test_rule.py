"""Sharing changes no number.

What a token's keys and values are, and what a query reads, depend only on the tokens before it, its
position, and the namespace: never on whether the prefix was cached, how prefill was cut into calls,
which step of the loop it is, or who else is in the batch. A new feature adds a row to `FEATURES`.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.jax_chunkattn.rule.features import FEATURES, Feature
from tests.jax_chunkattn.rule.histories import HISTORIES, NUM_TOKENS, PROMPT, Answer, cold
from tests.jax_chunkattn.toy import greedy_without_cache

TOLERANCE = 1e-5  # of log-probabilities, in float32
EACH_FEATURE = pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)


@functools.cache
def expected(feature: Feature) -> Answer:
    [(_, answer)] = cold(feature)
    return answer


def differs(answer: Answer, feature: Feature) -> bool:
    """Other tokens, or other probabilities of them than rounding gives."""
    tokens, logprobs = zip(*answer, strict=True)
    expected_tokens, expected_logprobs = zip(*expected(feature), strict=True)
    return tokens != expected_tokens or not np.allclose(
        logprobs, expected_logprobs, rtol=0, atol=TOLERANCE
    )


@EACH_FEATURE
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
def test_greedy_tokens_and_their_probabilities_do_not_depend_on_history(feature, history):
    answers = list(history(feature))
    assert answers
    wrong = [what for what, answer in answers if differs(answer, feature)]
    assert wrong == []


def test_identity_is_a_model_without_a_cache():
    tokens = [token for token, _ in expected(FEATURES[0])]
    assert tokens == greedy_without_cache(PROMPT, NUM_TOKENS)
