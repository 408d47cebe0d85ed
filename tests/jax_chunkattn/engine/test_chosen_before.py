"""A request that goes on from tokens which another engine has chosen."""

from __future__ import annotations

import math

import pytest

from jax_chunkattn import InvalidRequest, SamplingParams
from tests.jax_chunkattn.engine.engines import BytePairs, make_engine
from tests.jax_chunkattn.toy import token_tree

[PROMPT] = token_tree((1, 40))
PARAMS = {
    "greedy": SamplingParams(30),
    "drawn": SamplingParams(30, temperature=1.0, seed=7, top_k=20),
    "penalties": SamplingParams(
        30, temperature=0.7, seed=9, repetition_penalty=1.3, frequency_penalty=0.5
    ),
    "logprobs": SamplingParams(30, temperature=1.0, seed=3, logprobs=2),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_it_chooses_what_the_first_engine_would_have(params: SamplingParams):
    whole = make_engine().submit(PROMPT, params).result()
    engine = make_engine()
    for count in (1, 2, 17, 29):
        handle = engine.submit(PROMPT, params, chosen=whole.tokens[:count])
        events = list(handle.stream())
        assert sum((event.tokens for event in events), ()) == whole.tokens[count:]
        completion = handle.result()
        assert (completion.tokens, completion.finish_reason) == (whole.tokens, "length")
        if params.logprobs is not None:
            assert math.isnan(completion.logprobs[0].chosen)
            new = [one.chosen for one in completion.logprobs[count:]]
            assert new == pytest.approx([one.chosen for one in whole.logprobs[count:]], abs=1e-4)


def test_its_text_goes_on_and_stop_strings_may_begin_in_what_was_there():
    engine = make_engine(tokenizer=BytePairs())
    text = engine.submit(PROMPT, SamplingParams(30)).result().text
    tokens = engine.submit(PROMPT, SamplingParams(30)).result().tokens
    handle = engine.submit(PROMPT, SamplingParams(30), chosen=tokens[:11])
    new = "".join(event.text for event in handle.stream())
    assert handle.result().text == text
    assert text.endswith(new)


def test_what_has_ended_already_is_refused():
    engine = make_engine(tokenizer=BytePairs())
    with pytest.raises(InvalidRequest, match="begins with 2 chosen tokens"):
        engine.submit(PROMPT, SamplingParams(2), chosen=[1, 2])
    with pytest.raises(InvalidRequest, match="stop string"):
        engine.submit(PROMPT, SamplingParams(9, stop=("AB",)), chosen=[65, 66])
    with pytest.raises(InvalidRequest, match="chosen"):
        engine.submit(PROMPT, SamplingParams(9), chosen=[-1])
