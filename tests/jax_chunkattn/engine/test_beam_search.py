"""Beam search over forks against beam search over a model without a cache."""

from __future__ import annotations

import functools
import math

import pytest

import models
from jax_chunkattn import (
    CacheConfig,
    Engine,
    EngineClosed,
    Hypothesis,
    InvalidRequest,
    PoolExhausted,
    RequestFailed,
    SamplingParams,
    beam_search,
)
from tests.jax_chunkattn.engine.engines import SHARE_ALL, assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import (
    greedy_without_cache,
    log_probabilities_without_cache,
    token_tree,
)

PROMPT = token_tree((1, 44))[0]


def make(num_chunks: int = 200, **options) -> Engine:
    options = {"prefill_tokens": 32, "max_running": 4, **options}
    return make_engine(num_chunks, **options)


def search_without_cache(
    prompt, *, beams, max_tokens, length_penalty=1.0, stop_tokens=()
) -> list[Hypothesis]:
    """Ranks all continuations of all hypotheses, with the whole vocabulary, to the last token.

    The best `beams` that do not end go on; those that end count among the best `2 * beams`.
    """
    live, done = [((), 0.0)], []
    for length in range(1, max_tokens + 1):
        longer = [
            ((*tokens, token), logprob + value)
            for tokens, logprob in live
            for token, value in enumerate(
                log_probabilities_without_cache((*prompt, *tokens)).tolist()
            )
        ]
        longer.sort(key=lambda one: -one[1])
        ends = [tokens[-1] in stop_tokens or length == max_tokens for tokens, _ in longer]
        done += [one for one, end in zip(longer[: 2 * beams], ends, strict=False) if end]
        live = [one for one, end in zip(longer, ends, strict=True) if not end][:beams]
    ranked = [
        Hypothesis(tokens, logprob, logprob / len(tokens) ** length_penalty)
        for tokens, logprob in done
    ]
    return sorted(ranked, key=lambda one: -one.score)[:beams]


@functools.cache
def common_tokens(count: int) -> tuple[int, ...]:
    """Tokens that good hypotheses are made of, the commonest first."""
    found = search_without_cache(PROMPT, beams=4, max_tokens=8)
    tokens = [token for one in found for token in one.tokens]
    return tuple(sorted(set(tokens), key=lambda token: (-tokens.count(token), token))[:count])


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_finds_what_a_search_without_a_cache_finds(beams, max_tokens):
    engine = make()
    found = beam_search(engine, PROMPT, beams=beams, max_tokens=max_tokens)
    assert_same(found, search_without_cache(PROMPT, beams=beams, max_tokens=max_tokens))
    assert len(found) == beams
    assert_all_returned(engine)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 2.0])
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_stop_tokens_end_answers_and_the_length_penalty_ranks_them(beams, length_penalty):
    engine = make(stop_tokens=[common_tokens(1)[0]])  # the engine's own do not count
    options = {"beams": beams, "max_tokens": 9, "length_penalty": length_penalty}
    lengths = set()
    for number in (1, 3):
        stop_tokens = common_tokens(number + 1)[1:]
        found = beam_search(engine, PROMPT, stop_tokens=stop_tokens, **options)
        assert_same(found, search_without_cache(PROMPT, stop_tokens=stop_tokens, **options))
        lengths |= {len(one.tokens) for one in found}
        for one in found:
            assert one.tokens[-1] in stop_tokens or len(one.tokens) == 9
            assert not set(one.tokens[:-1]) & set(stop_tokens)
    if length_penalty <= 0:
        assert lengths != {9}, "nothing stopped"
    assert_all_returned(engine)


def test_as_many_go_on_as_there_are_beams_however_many_stop():
    """With every other likely token a stop token, more than half of the candidates may end."""
    best = log_probabilities_without_cache(tuple(PROMPT)).argsort()[::-1]
    stop_tokens = best[:6].tolist()
    options = {"beams": 2, "max_tokens": 6, "length_penalty": 3.0, "stop_tokens": stop_tokens}
    found = beam_search(make(), PROMPT, **options)
    assert_same(found, search_without_cache(PROMPT, **options))
    assert max(len(one.tokens) for one in found) > 1


def test_one_beam_without_stop_tokens_is_greedy_decoding():
    [found] = beam_search(make(), PROMPT, beams=1, max_tokens=12)
    assert list(found.tokens) == greedy_without_cache(PROMPT, 12)


def test_a_search_stops_early_when_no_hypothesis_can_win():
    likeliest = int(log_probabilities_without_cache(tuple(PROMPT)).argmax())
    engine = make()
    options = {"beams": 1, "stop_tokens": [likeliest], "length_penalty": 0.0}
    [found] = beam_search(engine, PROMPT, max_tokens=40, **options)
    assert found.tokens == (likeliest,)
    assert engine.stats.decode_tokens == 0
    assert_all_returned(engine)


def test_ties_are_kept_apart_and_the_smaller_token_comes_first():
    """Two tokens with the same embedding are equally likely wherever they may stand."""
    likeliest = int(log_probabilities_without_cache(tuple(PROMPT)).argmax())
    twin = max(token for token in range(likeliest) if token not in PROMPT)
    model = models.load("random:tiny").model
    embedding = model.embedding[...]
    model.embedding[...] = embedding.at[twin].set(embedding[likeliest])

    def search(**options):
        engine = Engine(
            model,
            CacheConfig(200, 16),
            steps_per_call=3,
            prefill_tokens=32,
            max_running=4,
            planner=SHARE_ALL,
        )
        return beam_search(engine, PROMPT, **options)

    [only] = search(beams=1, max_tokens=1)
    one, other = search(beams=2, max_tokens=1)
    assert only.tokens == (twin,)
    assert [one.tokens, other.tokens] == [(twin,), (likeliest,)]
    assert one.score == other.score
    longer = search(beams=4, max_tokens=5)
    assert longer == search(beams=4, max_tokens=5)
    assert len({one.tokens for one in longer}) == 4
    assert [one.score for one in longer] == sorted((one.score for one in longer), reverse=True)


def test_hypotheses_share_what_they_have_in_common():
    """Nothing but the prompt is ever computed by prefill, and every hypothesis is a fork."""
    engine = make()
    beam_search(engine, PROMPT, beams=4, max_tokens=12)
    stats = engine.stats
    assert stats.prefill_tokens == len(PROMPT)
    assert stats.forks == stats.submitted - 1 == 4 * 11
    assert stats.preemptions == stats.recoveries == 0
    # 44 tokens of the prompt and 11 generated fill 3 chunks; the fourth is a hypothesis's own.
    assert stats.most_chunks_in_use < 2 * 4 * 4
    assert stats.plan is not None
    assert stats.plan.shared
    assert_all_returned(engine)


def test_other_requests_go_on_during_a_search():
    prompts = token_tree((3, 20), seed=3)
    engine = make()
    handles = [engine.submit(prompt, SamplingParams(20)) for prompt in prompts]
    found = beam_search(engine, PROMPT, beams=2, max_tokens=9)
    assert all(handle.tokens for handle in handles)
    assert_same(found, search_without_cache(PROMPT, beams=2, max_tokens=9))
    assert run(handles) == [greedy_without_cache(prompt, 20) for prompt in prompts]
    assert_all_returned(engine)


@pytest.mark.slow
def test_a_pool_too_small_to_hold_all_hypotheses_changes_nothing():
    """Those that wait are dropped and computed again, beside another request that runs."""
    engine = make(num_chunks=10)
    other = token_tree((1, 30), seed=4)[0]
    handle = engine.submit(other, SamplingParams(60))
    found = beam_search(engine, PROMPT, beams=4, max_tokens=12)
    assert_same(found, search_without_cache(PROMPT, beams=4, max_tokens=12))
    assert engine.stats.forks < engine.stats.submitted - 2, "nothing was ever dropped"
    assert run([handle]) == [greedy_without_cache(other, 60)]
    assert_all_returned(engine)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beams": 0}, ValueError, "beams must be from 1 to 10, got 0"),
        ({"beams": 11}, ValueError, "beams must be from 1 to 10, got 11"),
        ({"beams": 9, "stop_tokens": range(12)}, ValueError, "at most 20 together, got 9 and 12"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 2000}, InvalidRequest, "asks for 2000 more"),
        ({"max_tokens": 400}, PoolExhausted, "asks for 400 more needs 28 chunks"),
        ({"prompt": [256]}, InvalidRequest, "token id 256"),
    ],
)
def test_what_can_never_be_found_is_refused_before_anything_is_computed(options, error, message):
    engine = make(num_chunks=10)
    with pytest.raises(error, match=message):
        beam_search(engine, **{"prompt": PROMPT, **options})
    assert engine.stats.submitted == 0
    assert not engine.has_work


def test_an_error_in_the_middle_gives_everything_back(monkeypatch):
    engine = make()
    decode = engine._core.device.decode

    def fail_later(*args):
        if engine.stats.forks > 5:
            raise RuntimeError("no more")
        return decode(*args)

    monkeypatch.setattr(engine._core.device, "decode", fail_later)
    with pytest.raises(RequestFailed, match="no more"):
        beam_search(engine, PROMPT, beams=2, max_tokens=9)
    assert_all_returned(engine)
    engine.close()
    with pytest.raises(EngineClosed):
        beam_search(engine, PROMPT)


def test_scores_are_what_they_are_said_to_be():
    stop = common_tokens(1)
    for one in beam_search(make(), PROMPT, beams=4, max_tokens=9, stop_tokens=stop):
        total = 0.0
        for index, token in enumerate(one.tokens):
            total += log_probabilities_without_cache((*PROMPT, *one.tokens[:index]))[token]
        assert one.logprob == pytest.approx(total, abs=1e-4)
        assert one.score == pytest.approx(total / len(one.tokens), abs=1e-4)
        assert math.isfinite(one.score)
