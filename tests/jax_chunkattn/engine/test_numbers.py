"""A model that gives no numbers for a request: that one ends, and nobody else is served by it."""

from __future__ import annotations

from typing import Any

import pytest

import models
from jax_chunkattn import RequestFailed, SamplingParams
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine
from tests.jax_chunkattn.toy import token_tree

SHARED = [token for token in token_tree((1, 64))[0] if token != 7][:48]
GOOD = [*SHARED, 1, 2, 3]
BAD = [*SHARED, *range(100, 140), 7, 8, 9]
NOT_SEVEN = {7: -100.0}


def model_without_numbers_behind_token_7() -> Any:
    """In its first layer 7 overflows; from the second on its keys are NaN for all behind it."""
    model: Any = models.load("random:tiny").model
    model.embedding[...] = model.embedding[...].at[:, 0].set(0).at[7].set(0).at[7, 0].set(9)
    model.blocks.attention_out[...] = model.blocks.attention_out[...].at[0, :, :, 0].set(0)
    model.blocks.gate_up[...] = model.blocks.gate_up[...].at[0, 0].set(1e38)
    return model


@pytest.fixture(scope="module")
def model():
    return model_without_numbers_behind_token_7()


def params(**options):
    return SamplingParams(**{"max_tokens": 12, "logit_bias": NOT_SEVEN, **options})


EVERY_KIND = {
    "greedy": {"logit_bias": {}},
    "biased": {},
    "drawn": {"temperature": 1.0, "seed": 0},
    "truncated": {"temperature": 1.0, "seed": 0, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    "penalised": {"repetition_penalty": 1.3, "logprobs": 2},
}


@pytest.mark.parametrize("options", EVERY_KIND.values(), ids=list(EVERY_KIND))
def test_a_prompt_without_numbers_ends_its_request_alone(model, options):
    expected = make_engine(model=model).submit(GOOD, params()).result()
    engine = make_engine(model=model)
    good = engine.submit(GOOD, params())
    told = []
    bad = engine.submit(BAD, params(**options), on_event=told.append)
    with pytest.raises(RequestFailed, match="token at position 91 are NaN or infinite") as failed:
        bad.result()
    assert isinstance(failed.value.__cause__, FloatingPointError)
    assert (bad.tokens, bad.finish_reason, told) == ((), "error", [])
    assert good.result() == expected.__class__(**{**vars(expected), "seed": good.params.seed})
    assert (engine.stats.failed, engine.stats.not_finite, engine.stats.recoveries) == (1, 1, 0)
    assert_all_returned(engine)


def test_an_answer_that_runs_out_of_numbers_keeps_what_it_had(model):
    """Token 7 is chosen by a bias; what follows it has no numbers."""
    engine = make_engine(model=model)
    handle = engine.submit(GOOD, params(logit_bias={7: 100.0}))
    events = handle.stream()
    assert next(events).tokens == (7,)
    with pytest.raises(RequestFailed, match="position 52 are NaN"):
        next(events)
    assert handle.tokens == (7,)
    assert engine.stats.not_finite == 1
    assert_all_returned(engine)


def test_samples_of_such_a_prompt_all_end(model):
    engine = make_engine(model=model)
    samples = engine.submit_samples(BAD, params(n=3, temperature=1.0))
    for handle in samples:
        with pytest.raises(RequestFailed, match="NaN"):
            handle.result()
    assert engine.stats.not_finite == 3
    assert engine.stats.chunks_cached == 0
    assert_all_returned(engine)


def test_what_such_a_request_computed_is_not_cached_for_who_found_it_half_way(model):
    engine = make_engine(model=model, prefill_tokens=32)
    bad = [7, *range(100, 179)]
    handles = [engine.submit(bad, params())]
    engine.step()
    handles.append(engine.submit([*bad, 9], params()))
    for handle in handles:
        with pytest.raises(RequestFailed, match="NaN"):
            handle.result()
    assert engine.stats.chunks_cached == 0
    assert_all_returned(engine)


def test_what_such_a_request_computed_is_not_cached_and_what_it_found_is(model):
    engine = make_engine(model=model)
    engine.submit(GOOD, params()).result()
    cached = engine.stats.chunks_cached
    for _ in range(2):
        with pytest.raises(RequestFailed):
            engine.submit(BAD, params()).result()
        assert engine.stats.chunks_cached == cached > 0
        engine.check()
    before = engine.stats.prompts
    engine.submit(GOOD, params()).result()
    assert engine.stats.prompts.hit - before.hit == 48
    assert_all_returned(engine)
