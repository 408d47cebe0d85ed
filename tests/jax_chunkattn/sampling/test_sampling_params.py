from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from fractions import Fraction

import numpy as np
import pytest

from jax_chunkattn.sampling import (
    MAX_BIASED_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    SamplingParams,
)

NAN, INF = float("nan"), float("inf")

REFUSED = [
    ({"max_tokens": 0}, "max_tokens must be an integer from 1 to 2147483647, got 0"),
    ({"max_tokens": 2**31}, "max_tokens must be an integer from 1"),
    ({"max_tokens": 4.0}, "max_tokens must be an integer from 1 to 2147483647, got 4.0"),
    ({"max_tokens": True}, "max_tokens must be an integer .* got True"),
    ({"max_tokens": None}, "max_tokens must be an integer .* got None"),
    ({"temperature": -0.1}, r"temperature must be a number from 0 \(greedy\) .* got -0.1"),
    ({"temperature": NAN}, "temperature must be a number .* got nan"),
    ({"temperature": INF}, "temperature must be a number .* got inf"),
    ({"temperature": 10**400}, "temperature must be a number"),
    ({"temperature": "1"}, "temperature must be a number .* got '1'"),
    ({"temperature": True}, "temperature must be a number .* got True"),
    ({"temperature": np.bool_(True)}, "temperature must be a number"),
    ({"temperature": None}, "temperature must be a number .* got None"),
    ({"top_k": -1}, r"top_k must be an integer from 0 \(off\) to 2147483647, got -1"),
    ({"top_k": 2**31}, "top_k must be an integer"),
    ({"top_k": 3.5}, "top_k must be an integer"),
    ({"top_p": 0.0}, r"top_p must be a number above 0 and at most 1 \(off\), got 0.0"),
    ({"top_p": 1.01}, "top_p must be a number above 0"),
    ({"top_p": NAN}, "top_p must be a number above 0"),
    ({"seed": -1}, "seed must be an integer from 0 to 4294967295, got -1"),
    ({"seed": 2**32}, "seed must be an integer"),
    ({"seed": 1.5}, "seed must be an integer"),
    ({"min_p": -0.1}, r"min_p must be a number from 0 \(off\) to 1, got -0.1"),
    ({"min_p": 1.1}, "min_p must be a number"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a number from 0.01 to 100"),
    ({"repetition_penalty": INF}, "repetition_penalty must be a number"),
    ({"presence_penalty": -2.1}, "presence_penalty must be a number from -2 to 2"),
    ({"presence_penalty": NAN}, "presence_penalty must be a number"),
    ({"frequency_penalty": 2.1}, "frequency_penalty must be a number from -2 to 2"),
    ({"frequency_penalty": "0"}, "frequency_penalty must be a number"),
    ({"logit_bias": [(1, 2.0)]}, "logit_bias must map token ids to numbers, got"),
    ({"logit_bias": None}, "logit_bias must map token ids to numbers, got None"),
    ({"logit_bias": {"1": 2.0}}, "each token id of logit_bias must be an integer .* got '1'"),
    ({"logit_bias": {-1: 2.0}}, "each token id of logit_bias must be an integer from 0"),
    ({"logit_bias": {2**31 - 1: 2.0}}, "each token id of logit_bias must be an integer"),
    ({"logit_bias": {7: 101}}, "logit_bias of token 7 must be a number from -100 to 100, got 101"),
    ({"logit_bias": {7: -INF}}, "logit_bias of token 7 must be a number"),
    ({"logit_bias": {7: False}}, "logit_bias of token 7 must be a number"),
    (
        {"logit_bias": dict.fromkeys(range(MAX_BIASED_TOKENS + 1), 1.0)},
        "logit_bias must name at most 256 tokens, got 257",
    ),
    ({"stop": ""}, "stop must be strings that are not empty, got ''"),
    ({"stop": ["a", ""]}, "stop must be strings that are not empty, got ''"),
    ({"stop": ["a", 5]}, "stop must be strings that are not empty, got 5"),
    ({"stop": b"ab"}, "stop must be strings that are not empty, got 97"),
    ({"stop": 5}, "stop must be a string or several, got 5"),
    ({"stop": None}, "stop must be a string or several, got None"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a sequence of token ids, got 5"),
    ({"stop_token_ids": "5"}, "stop_token_ids must be a sequence of token ids, got '5'"),
    ({"stop_token_ids": [-1]}, "each of stop_token_ids must be an integer from 0 .* got -1"),
    ({"stop_token_ids": [1.5]}, "each of stop_token_ids must be an integer"),
    ({"stop_token_ids": [True]}, "each of stop_token_ids must be an integer"),
    (
        {"stop_token_ids": range(MAX_STOP_TOKENS + 1)},
        "stop_token_ids must be at most 16 tokens, got 17",
    ),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ({"ignore_eos": None}, "ignore_eos must be True or False, got None"),
    ({"logprobs": -1}, r"logprobs must be an integer from 0 to 20, or None \(off\), got -1"),
    ({"logprobs": MAX_LOGPROBS + 1}, "logprobs must be an integer"),
    ({"logprobs": True}, "logprobs must be an integer"),
    ({"n": 0}, "n must be an integer from 1 to 2147483647, got 0"),
    ({"n": 1.0}, "n must be an integer"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**options)


def test_every_field_is_checked():
    checked = {name for options, _ in REFUSED for name in options}
    assert checked == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1, "n": 1},
        {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0},
        {"temperature": 1e6, "top_k": 2**31 - 1, "top_p": 1e-300, "min_p": 1},
        {"seed": 2**32 - 1},
        {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {token: -100 + token / 2 for token in range(MAX_BIASED_TOKENS)}},
        {"logit_bias": {2**31 - 2: 100}, "stop_token_ids": [0, 2**31 - 2]},
        {"stop_token_ids": range(MAX_STOP_TOKENS)},
        {"logprobs": 0},
        {"logprobs": MAX_LOGPROBS},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(options):
    SamplingParams(**options)


def test_the_first_five_may_be_positional_and_no_more():
    assert SamplingParams(7, 0.5, 3, 0.9, 11) == SamplingParams(
        max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=11
    )
    with pytest.raises(TypeError):
        SamplingParams(7, 0.5, 3, 0.9, 11, 0.1)  # type: ignore[misc]


def test_numbers_of_other_libraries_become_pythons():
    params = SamplingParams(
        max_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=Fraction(1, 2),  # type: ignore[arg-type]
        logit_bias={np.int32(3): np.float64(1)},  # type: ignore[dict-item]
        stop_token_ids=np.array([4, 5]),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(
        5, 0.5, top_p=0.5, logit_bias={3: 1.0}, stop_token_ids=(4, 5), ignore_eos=True
    )
    values = [params.max_tokens, params.temperature, params.top_p, params.ignore_eos]
    assert [type(value) for value in values] == [int, float, float, bool]
    assert [type(token) for token in (*params.stop_token_ids, *params.logit_bias)] == [int] * 3


def test_stop_may_be_one_string_or_several():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()


def test_parameters_cannot_be_changed_from_outside():
    biases = {5: 1.0}
    params = SamplingParams(logit_bias=biases)
    biases[5] = 50.0
    assert params.logit_bias == {5: 1.0}
    with pytest.raises(TypeError):
        params.logit_bias[5] = 2.0  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        params.seed = 3  # type: ignore[misc]


def test_parameters_copy_pickle_hash_and_replace():
    params = SamplingParams(logit_bias={5: 1.0, 9: -2.0}, stop="x", stop_token_ids=[3])
    for twin in (
        copy.deepcopy(params),
        pickle.loads(pickle.dumps(params)),
        replace(params, top_k=0),
        SamplingParams(logit_bias={9: -2.0, 5: 1.0}, stop=("x",), stop_token_ids=(3,)),
    ):
        assert twin == params
        assert hash(twin) == hash(params)
    assert replace(params, logit_bias={5: 1.0}) != params
    assert "logit_bias={5: 1.0, 9: -2.0}" in repr(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {3: 1.0, 100: 1.0}}, "logit_bias names token 100; .* from 0 to 99"),
        ({"stop_token_ids": [5, 2000]}, "stop_token_ids names token 2000; .* from 0 to 99"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options).check_vocabulary(100)
    SamplingParams(**options).check_vocabulary(2001)


def test_parameters_that_name_no_token_fit_every_vocabulary():
    SamplingParams().check_vocabulary(1)
