"""Sharing changes no number.

What a token's keys and values are, and what a query reads, depend only on the tokens before it, its
position, and the namespace: never on whether the prefix was cached, how prefill was cut into calls,
which step of the loop it is, or who else is in the batch. A new feature adds a row to `FEATURES`.
"""

from __future__ import annotations

import functools

import pytest

from tests.jax_chunkattn.rule.features import FEATURES, Feature
from tests.jax_chunkattn.rule.histories import HISTORIES, NUM_TOKENS, PROMPT, cold
from tests.jax_chunkattn.toy import greedy_without_cache

EACH_FEATURE = pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)


@functools.cache
def expected(feature: Feature) -> tuple[int, ...]:
    [(_, tokens)] = cold(feature)
    return tokens


@EACH_FEATURE
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
def test_greedy_tokens_do_not_depend_on_history(feature, history):
    answers = list(history(feature))
    assert answers
    wrong = [what for what, tokens in answers if tokens != expected(feature)]
    assert wrong == []


def test_identity_is_a_model_without_a_cache():
    assert list(expected(FEATURES[0])) == greedy_without_cache(PROMPT, NUM_TOKENS)
