"""Scores of tokens behind a prefix are those of a pass without a cache, whatever is cached."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import (
    ChunkSelector,
    Engine,
    EngineClosed,
    HeadClusters,
    InvalidRequest,
    PoolExhausted,
    RequestFailed,
    SamplingParams,
)
from jax_chunkattn.device.device import Device
from jax_chunkattn.device.scores import score_tokens
from jax_chunkattn.engine.recording import Recorder
from jax_chunkattn.planning.scored_tokens import ScoredTokens
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_faults import fail_once
from tests.jax_chunkattn.engine.test_interrupts import interrupted_at
from tests.jax_chunkattn.engine.test_numbers import model_without_numbers_behind_token_7
from tests.jax_chunkattn.toy import logits_without_cache, token_tree, toy_model, windowed_model

TEXTS = token_tree((1, 90), (5, 25), seed=3)
PREFIX = TEXTS[0][:90]
CONTINUATIONS = [text[90:] for text in TEXTS]


def expected(prefix, continuation, model=None) -> np.ndarray:
    """Log-probabilities by a pass in dense attention, float64 [tokens of the continuation]."""
    tokens = (*prefix, *continuation)
    logits = logits_without_cache(tokens[:-1], model).astype(np.float64)[len(prefix) - 1 :]
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return np.take_along_axis(logits, np.array(continuation)[:, None], axis=1)[:, 0]


def assert_right(scores, prefix, continuations, model=None) -> None:
    for score, continuation in zip(scores, continuations, strict=True):
        assert score.tokens == tuple(continuation)
        found = [one.chosen for one in score.logprobs]
        np.testing.assert_allclose(found, expected(prefix, continuation, model), atol=2e-5)


def engine_of(**options) -> Engine:
    return make_engine(prefill_tokens=32, **options)


def test_scores_are_those_without_a_cache_cold_and_warm():
    engine = engine_of()
    for _ in range(2):
        assert_right(engine.score(PREFIX, CONTINUATIONS), PREFIX, CONTINUATIONS)
    assert engine.stats.scored_tokens == 2 * 5 * 25
    assert_all_returned(engine)


def test_the_prefix_is_computed_once_with_its_part_of_a_chunk():
    engine = engine_of()
    engine.score(PREFIX, CONTINUATIONS)
    own = 5 * (1 + 24)  # the prefix's last token, and all but the last of its own
    assert engine.stats.prefill_tokens == 90 - 1 + own
    before = engine.stats.prefill_tokens
    engine.score(PREFIX, [[1, 2, 3]] * 2)
    assert engine.stats.prefill_tokens - before == 2 * 3


def test_one_token_is_scored_by_the_prefix_alone():
    engine = engine_of()
    scores = engine.score(PREFIX, [[5], [6, 7], [5]])
    assert_right(scores, PREFIX, [[5], [6, 7], [5]])
    assert scores[0].total == pytest.approx(scores[2].total, abs=1e-5)


def test_continuations_longer_than_a_call_are_scored_in_pieces():
    engine = engine_of()
    [long] = token_tree((1, 150), seed=5)
    continuations = [long, long[:70], [*long[:40], 3, 4]]
    assert_right(engine.score([9], continuations), [9], continuations)
    assert_right(engine.score([9], continuations[::-1]), [9], continuations[::-1])
    assert_all_returned(engine)


def test_prefixes_of_a_batch_share_what_they_have_in_common():
    engine = engine_of()
    queries = [(PREFIX[:70], CONTINUATIONS[:2]), (PREFIX[:50], CONTINUATIONS), ([1], [])]
    found = engine.score_batch(queries)
    for (prefix, continuations), scores in zip(queries, found, strict=True):
        assert_right(scores, prefix, continuations)
    cold = make_engine(prefill_tokens=32)
    for (prefix, continuations), scores in zip(queries, found, strict=True):
        again = cold.score(prefix, continuations)
        assert [one.total for one in again] == pytest.approx([one.total for one in scores])


def test_the_likeliest_are_reported_as_asked_for():
    engine = engine_of()
    [score] = engine.score(PREFIX, [CONTINUATIONS[0]], top=3)
    logits = logits_without_cache((*PREFIX, *CONTINUATIONS[0][:-1]))[len(PREFIX) - 1 :]
    assert [[token for token, _ in one.top] for one in score.logprobs] == [
        np.argsort(-row, kind="stable")[:3].tolist() for row in logits
    ]
    assert not score.is_greedy
    greedy = engine.submit(PREFIX, SamplingParams(6)).result().tokens
    [score] = engine.score(PREFIX, [greedy], top=1)
    assert score.is_greedy
    with pytest.raises(ValueError, match="ask for top=1"):
        _ = engine.score(PREFIX, [greedy])[0].is_greedy


def test_scores_of_an_answer_are_those_it_was_sampled_with():
    engine = engine_of()
    params = SamplingParams(20, temperature=0.8, seed=1, logprobs=2)
    answer = engine.submit(PREFIX, params).result()
    [score] = engine.score(PREFIX, [answer.tokens], top=2)
    sampled = [one.chosen for one in answer.logprobs]
    assert [one.chosen for one in score.logprobs] == pytest.approx(sampled, abs=1e-4)


def test_requests_go_on_while_others_are_scored():
    engine = engine_of(max_running=2)
    alone = run([make_engine(prefill_tokens=32).submit(text, SamplingParams(9)) for text in TEXTS])
    handles = [engine.submit(text, SamplingParams(9)) for text in TEXTS]
    assert_right(engine.score(PREFIX, CONTINUATIONS), PREFIX, CONTINUATIONS)
    assert run(handles) == alone
    assert_all_returned(engine)


def test_a_pool_that_holds_one_at_a_time_scores_them_all():
    engine = engine_of(num_chunks=8)
    assert_right(engine.score(PREFIX, CONTINUATIONS), PREFIX, CONTINUATIONS)
    with pytest.raises(PoolExhausted, match="needs 9 chunks"):
        engine.score(PREFIX, [[1], [1] * 50])
    assert not engine.has_work
    assert_all_returned(engine)


@pytest.mark.parametrize("window_chunks", [26, pytest.param(None, marks=pytest.mark.slow)])
def test_windows_see_what_they_should(window_chunks):
    engine = engine_of(model=windowed_model(), window_chunks=window_chunks)
    for _ in range(2):
        scores = engine.score(PREFIX, CONTINUATIONS[:3])
        assert_right(scores, PREFIX, CONTINUATIONS[:3], windowed_model())
    assert_all_returned(engine)


def test_encoded_chunks_score_as_they_decode():
    engine = engine_of(codec="int8")
    first = engine.score(PREFIX, CONTINUATIONS[:2])
    exact = expected(PREFIX, CONTINUATIONS[0])
    found = [one.chosen for one in first[0].logprobs]
    np.testing.assert_allclose(found, exact, atol=0.05)
    again = engine.score(PREFIX, CONTINUATIONS[:2])
    assert [one.total for one in again] == pytest.approx([one.total for one in first], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stored",
    [
        {"codec": "int4"},
        {"selector": ChunkSelector(0.4, whole=0)},
        {"clusters": HeadClusters((2, 3))},
    ],
    ids=lambda stored: next(iter(stored)),
)
def test_scores_are_those_of_decoding_however_chunks_are_stored(stored):
    """With what was cached, in other pieces and in another order."""
    engine, other = make_engine(prefill_tokens=32, **stored), make_engine(**stored)
    params = SamplingParams(20, logprobs=0)
    [answer] = [engine.submit(PREFIX, params).result()]
    continuations = [answer.tokens, *CONTINUATIONS]
    scores = engine.score(PREFIX, continuations)
    sampled = [token.chosen for token in answer.logprobs]
    assert [token.chosen for token in scores[0].logprobs] == pytest.approx(sampled, abs=2e-5)
    totals = [score.total for score in scores]
    again = engine.score(PREFIX, continuations[::-1])[::-1]
    assert [score.total for score in again] == pytest.approx(totals, abs=1e-4)
    alone = [other.score(PREFIX, [one])[0].total for one in continuations]
    assert alone == pytest.approx(totals, abs=1e-4)


@pytest.mark.parametrize(
    ("prefix", "continuations", "options", "error"),
    [
        ([], [[1]], {}, "prefix 0 is empty"),
        ([1], [[2], []], {}, "continuation 1 of prefix 0 is empty"),
        ([1], [[256]], {}, "continuation 0 of prefix 0 has token id 256"),
        ([1], "text", {}, "continuations must be a sequence"),
        ([1], [[2]], {"top": 21}, "top must be an integer from 0 to"),
        ([1] * 1000, [[2] * 100], {}, "the model has 1024 positions"),
        ("text", [[1]], {}, "needs an engine with a tokenizer"),
    ],
)
def test_what_cannot_be_scored_is_refused(prefix, continuations, options, error):
    engine = engine_of()
    before = engine.stats
    with pytest.raises(InvalidRequest, match=error):
        engine.score(prefix, continuations, **options)
    assert engine.stats == before


def test_a_closed_engine_scores_nothing():
    engine = engine_of()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.score(PREFIX, CONTINUATIONS)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (Device, "prefill", 1),
        (Device, "fetch", 2),
        (PrefixTree, "insert", 3),
        (Recorder, "record_scores", 1),
        (Device, "copy_chunks", 2),
    ],
)
def test_an_error_costs_time_only(monkeypatch, owner, name, at):
    engine = engine_of()
    called = fail_once(monkeypatch, owner, name, at)
    assert_right(engine.score(PREFIX, CONTINUATIONS), PREFIX, CONTINUATIONS)
    assert len(called) > at
    assert engine.stats.recoveries == 1
    assert_all_returned(engine)


def test_a_lasting_error_ends_it_and_leaves_nothing(monkeypatch):
    engine = engine_of()
    handle = engine.submit(PREFIX, SamplingParams(4))
    handle.result()
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record_scores", lambda *_: 1 / 0)
        with pytest.raises(RequestFailed, match="division by zero"):
            engine.score(PREFIX, CONTINUATIONS)
        engine.run()
    assert engine.stats.failed == 0
    assert_right(engine.score(PREFIX, CONTINUATIONS), PREFIX, CONTINUATIONS)
    assert_all_returned(engine)


def test_what_has_no_numbers_is_no_score():
    engine = engine_of(model=model_without_numbers_behind_token_7())
    with pytest.raises(RequestFailed, match="token at position 6 are NaN or infinite"):
        engine.score([1, 2, 3], [[4, 5], [6, 5, 7, 8]])
    engine.run()
    assert engine.stats.not_finite == 1
    assert np.isfinite(engine.score([1, 2, 3], [[4, 5]])[0].total)
    assert_all_returned(engine)


def test_an_interrupt_leaves_nothing_to_score():
    """At every moment, in steps; whoever comes next is not held up by it."""
    engine = engine_of()
    queries = [(PREFIX, CONTINUATIONS[:2]), ([1], [[2, 3]])]
    interrupted = []
    for number in range(1, 10_000, 61):
        function = interrupted_at(number, lambda: engine.score_batch(queries))
        if function is None:
            break
        interrupted.append(function)
        assert engine.submit([5, 6], SamplingParams(1)).result().tokens
        assert not engine.has_work, function
        engine.check()
        engine.reset()
    assert len(set(interrupted)) > 20
    assert_right(engine.score(PREFIX, CONTINUATIONS), PREFIX, CONTINUATIONS)
    assert_all_returned(engine)


class Unembedded:
    """A model whose hidden states are its logits."""

    cache_spec = toy_model().cache_spec
    vocab_size, max_positions = 3, 32

    def __call__(self, tokens, positions, pool, attend):
        raise NotImplementedError

    def logits(self, hidden):
        return hidden


def test_infinite_logits_are_no_score():
    scored = ScoredTokens.pack([[1, 0]], [0], 32)
    assert scored is not None
    hidden = jnp.zeros((32, 3)).at[0].set(jnp.array([jnp.inf, 0, 1])).at[1, 1].set(-jnp.inf)
    found = score_tokens(Unembedded(), hidden, scored)
    assert np.isnan(found.chosen[0])
    assert found.chosen[1] == pytest.approx(-np.log(2))
