"""What `/v1/completions` and `/v1/score` answer is what the engine gives."""

from __future__ import annotations

import math

import pytest

from jax_chunkattn import SamplingParams
from tests.jax_chunkattn.engine.engines import BytePairs, make_engine
from tests.jax_chunkattn.server.endpoints import MODEL, Running, joined, running
from tests.jax_chunkattn.toy import greedy_without_cache, log_probabilities_without_cache

PROMPT = "The quick brown fox jumps over the lazy dog"
TOKENS = BytePairs().encode(PROMPT)


def test_a_text_is_answered_by_the_likeliest_tokens(tiny: Running):
    reply = tiny.complete(PROMPT, max_tokens=7)
    assert reply.status == 200
    expected = greedy_without_cache(TOKENS, 7)
    [choice] = reply.value["choices"]
    assert choice["token_ids"] == expected
    assert choice["prompt_token_ids"] == TOKENS
    assert choice["text"] == BytePairs().decode(expected)
    assert choice["finish_reason"] == "length"
    usage = reply.value["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(TOKENS), 7)
    assert usage["total_tokens"] == len(TOKENS) + 7


def test_sixteen_tokens_are_given_when_nothing_is_said(tiny: Running):
    assert len(tiny.complete(PROMPT).value["choices"][0]["token_ids"]) == 16


@pytest.mark.parametrize("logprobs", [None, 3], ids=["plain", "logprobs"])
def test_a_stream_has_the_same_in_pieces(tiny: Running, logprobs: int | None):
    fields = {"max_tokens": 11, "n": 2, "logprobs": logprobs, "seed": 3, "temperature": 1.0}
    whole = tiny.complete(PROMPT, **fields).value["choices"]
    events = tiny.complete(PROMPT, stream=True, **fields).events
    for index, choice in enumerate(whole):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert len(pieces) > 1
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert joined(piece["token_ids"] for piece in pieces) == choice["token_ids"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        for name in ("tokens", "text_offset"):
            assert joined(piece["logprobs"][name] for piece in pieces) == choice["logprobs"][name]
    assert len({event["id"] for event in events}) == 1


def test_usage_ends_a_stream_that_asks_for_it(tiny: Running):
    events = tiny.complete(
        PROMPT, max_tokens=4, stream=True, stream_options={"include_usage": True}
    ).events
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4


def test_samples_are_those_of_the_engine(tiny: Running):
    reply = tiny.complete(PROMPT, max_tokens=6, n=3, seed=7, temperature=0.9, top_p=0.95)
    params = SamplingParams(6, temperature=0.9, top_p=0.95, seed=7, n=3)
    [output] = tiny.engine.generate([TOKENS], params)
    assert [choice["index"] for choice in reply.value["choices"]] == [0, 1, 2]
    found = [tuple(choice["token_ids"]) for choice in reply.value["choices"]]
    assert found == [sample.tokens for sample in output.samples]


def test_several_prompts_have_an_answer_each_per_sample(tiny: Running):
    others = [[1, 2, 3], [4, 5, 6, 7]]
    choices = tiny.complete(others, max_tokens=3, n=2).value["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for number, choice in enumerate(choices):
        assert choice["token_ids"] == greedy_without_cache(others[number // 2], 3)
    texts = tiny.complete(["ab", "cd"], max_tokens=1).value["choices"]
    assert [choice["prompt_token_ids"] for choice in texts] == [[97, 98], [99, 100]]


def test_the_seed_may_be_any_of_openais(tiny: Running):
    fields = {"max_tokens": 8, "temperature": 1.0}
    one = tiny.complete(PROMPT, seed=-1, **fields).value["choices"][0]["token_ids"]
    same = tiny.complete(PROMPT, seed=2**32 - 1, **fields).value["choices"][0]["token_ids"]
    assert one == same
    assert one != tiny.complete(PROMPT, seed=5, **fields).value["choices"][0]["token_ids"]


def test_a_bias_a_penalty_and_stop_tokens_are_taken(tiny: Running):
    chosen = greedy_without_cache(TOKENS, 4)
    biased = tiny.complete(PROMPT, max_tokens=3, logit_bias={"65": 100}).value["choices"][0]
    assert biased["text"] == "AAA"
    once = {"logit_bias": {"65": 30, "66": 29.5}, "presence_penalty": 2, "max_tokens": 2}
    assert tiny.complete(PROMPT, **once).value["choices"][0]["text"] == "AB"
    stopped = tiny.complete(PROMPT, max_tokens=4, stop_token_ids=[chosen[1]]).value["choices"][0]
    assert (stopped["finish_reason"], stopped["token_ids"]) == ("stop", chosen[:2])


@pytest.mark.parametrize(
    ("stop", "expected"), [("CB", "A"), (["xyz", "BA"], "ACB")], ids=["one", "several"]
)
def test_text_ends_before_a_stop_string(tiny: Running, stop: str | list[str], expected: str):
    bias = {"65": 30, "66": 29, "67": 28}
    penalties = {"presence_penalty": 2, "frequency_penalty": 2}
    fields = {"logit_bias": bias, "max_tokens": 6, **penalties}
    unstopped = tiny.complete("The quick brown fox", **fields).value["choices"][0]["text"]
    assert unstopped.startswith("ACBBA")
    for streams in (False, True):
        reply = tiny.complete("The quick brown fox", stop=stop, stream=streams, **fields)
        pieces = [one["choices"][0] for one in (reply.events if streams else [reply.value])]
        assert "".join(piece["text"] for piece in pieces) == expected
        assert pieces[-1]["finish_reason"] == "stop"


def test_log_probabilities_are_the_models_own(tiny: Running):
    [choice] = tiny.complete(PROMPT, max_tokens=2, logprobs=2).value["choices"]
    told = choice["logprobs"]
    first = log_probabilities_without_cache(tuple(TOKENS))
    assert told["token_logprobs"][0] == pytest.approx(first.max(), abs=1e-4)
    assert max(told["top_logprobs"][0].values()) == pytest.approx(first.max(), abs=1e-4)
    assert told["text_offset"] == [0, len(told["tokens"][0])]


def test_echo_repeats_the_prompt(tiny: Running):
    plain, echoed = (
        tiny.complete(PROMPT, max_tokens=3),
        tiny.complete(PROMPT, max_tokens=3, echo=True),
    )
    expected = PROMPT + plain.value["choices"][0]["text"]
    assert echoed.value["choices"][0]["text"] == expected
    events = tiny.complete(TOKENS, max_tokens=3, echo=True, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == expected


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_with_logprobs_tells_the_prompts(tiny: Running, max_tokens: int):
    """As evaluation harnesses ask for it."""
    reply = tiny.complete(PROMPT, max_tokens=max_tokens, echo=True, logprobs=1)
    told = reply.value["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(TOKENS) + max_tokens
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    [score] = tiny.engine.score(TOKENS[:1], [TOKENS[1:]])
    found = told["token_logprobs"][1 : len(TOKENS)]
    assert found == pytest.approx([one.chosen for one in score.logprobs], abs=1e-5)
    assert "".join(told["tokens"][: len(TOKENS)]) == PROMPT
    assert told["text_offset"][: len(TOKENS)] == list(range(len(TOKENS)))


def test_usage_says_what_was_cached_and_why_not_the_rest(tiny: Running):
    prompt = [200 + at % 40 for at in range(41)]  # two chunks of 16, and nine tokens
    first = tiny.complete(prompt, max_tokens=1).value["usage"]["prompt_tokens_details"]
    assert first["cached_tokens"] == 0
    assert first["missed_tokens"] == {
        "too_short": 9, "new": 32, "evicted": 0, "window": 0, "last": 0,
    }  # fmt: skip
    second = tiny.complete([*prompt[:36], 1], max_tokens=1).value["usage"]
    details = second["prompt_tokens_details"]
    assert details["cached_tokens"] >= 32
    total = details["cached_tokens"] + sum(details["missed_tokens"].values())
    assert total == second["prompt_tokens"] == 37


def test_what_another_salt_computed_looks_new(tiny: Running):
    prompt = [150 + at for at in range(40)]
    tiny.complete(prompt, max_tokens=1)
    salted = tiny.complete(prompt, max_tokens=1, cache_salt="other").value["usage"]
    details = salted["prompt_tokens_details"]
    assert (details["cached_tokens"], details["missed_tokens"]["new"]) == (0, 32)
    assert "salt" not in details["missed_tokens"]
    assert tiny.engine.stats.prompts.salt >= 32
    again = tiny.complete(prompt, max_tokens=1, cache_salt="other").value["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 32


def test_scores_are_those_of_the_engine(tiny: Running):
    continuations = [[5, 6, 7], "xyz", *([9, at] for at in range(12))]
    asked = {"model": MODEL, "prefix": PROMPT, "continuations": continuations, "top_logprobs": 2}
    reply = tiny.post("/v1/score", asked)
    assert reply.status == 200
    expected = tiny.engine.score(PROMPT, continuations, top=2)
    assert [one["index"] for one in reply.value["data"]] == list(range(14))
    for told, score in zip(reply.value["data"], expected, strict=True):
        assert told["score"] == pytest.approx(score.total, abs=1e-5)
        assert told["tokens"] == list(score.tokens)
        assert told["is_greedy"] == score.is_greedy
        assert [len(one) for one in told["top_logprobs"]] == [2] * len(score.tokens)
        assert math.fsum(told["token_logprobs"]) == pytest.approx(told["score"], abs=1e-6)


def test_a_model_without_a_tokenizer_takes_ids_alone():
    with running(make_engine(), served={"tokenizer": None, "chat": None}) as plain:
        reply = plain.complete([1, 2, 3], max_tokens=2, logprobs=1)
        [choice] = reply.value["choices"]
        assert choice["text"] == ""
        expected = greedy_without_cache([1, 2, 3], 2)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected]
        refused = plain.complete("text")
        assert (refused.status, "has no tokenizer" in refused.body.decode()) == (400, True)
        chat = plain.chat([{"role": "user", "content": "hi"}])
        assert (chat.status, "no chat template" in chat.body.decode()) == (400, True)


def test_the_model_is_told(tiny: Running):
    [model] = tiny.get("/v1/models").value["data"]
    assert (model["id"], model["max_model_len"], model["vocab_size"]) == (MODEL, 1024, 256)
    assert tiny.get(f"/v1/models/{MODEL}").value == model
    assert tiny.get("/v1/models/other").status == 404


@pytest.mark.parametrize("prompt", ["", [[99_999_999]]])
def test_an_echo_of_what_is_no_prompt_is_refused(tiny: Running, prompt: object):
    reply = tiny.complete(prompt, echo=True, max_tokens=0, logprobs=1)
    assert reply.status == 400
    assert "prompt" in reply.value["error"]["message"]
