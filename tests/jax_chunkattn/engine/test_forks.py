"""Forks: continuations that share what is sealed, and searches built on them."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn import InvalidRequest, SamplingParams
from jax_chunkattn.device.invocations import Invocations
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree


@pytest.mark.parametrize("steps_before", range(7))
def test_a_fork_goes_on_as_its_parent_would(steps_before):
    [prompt] = token_tree((1, 52))
    engine = make_engine(prefill_tokens=32)
    parent = engine.submit(prompt, SamplingParams(20))
    for _ in range(steps_before):
        engine.step()
    child = parent.fork()
    engine.check()
    grandchild = child.fork(SamplingParams(30))
    expected = greedy_without_cache(prompt, 30)
    assert run([parent, child, grandchild]) == [expected[:20], expected[:20], expected]
    assert_all_returned(engine)


def test_a_branch_continues_behind_another_token():
    [prompt] = token_tree((1, 52))
    engine = make_engine()
    parent = engine.submit(prompt, SamplingParams(6), hold=True)
    first = run([parent])[0]
    computed = engine.stats.prefill_tokens
    others = [(first[-1] + offset) % 256 for offset in (1, 2)]
    branches = [parent.fork(SamplingParams(16), next_token=token) for token in others]
    for token, tokens in zip(others, run(branches), strict=True):
        begin = [*first[:-1], token]
        assert tokens == begin + greedy_without_cache(prompt + begin, 10)
    assert engine.stats.prefill_tokens == computed
    assert engine.stats.forks == 2
    parent.release()
    assert_all_returned(engine)


def test_a_fork_of_a_request_that_is_gone_computes_what_is_not_cached():
    [prompt] = token_tree((1, 52))
    engine = make_engine()
    parent = engine.submit(prompt, SamplingParams(6))
    run([parent])
    child = parent.fork(SamplingParams(12))
    assert run([child]) == [greedy_without_cache(prompt, 12)]
    assert engine.stats.forks == 0
    assert_all_returned(engine)


def test_a_fork_has_one_logprob_for_each_of_its_tokens_if_it_asks():
    """NaN for those that its parent does not know."""
    [prompt] = token_tree((1, 52))
    engine = make_engine()
    asked = engine.submit(prompt, SamplingParams(6, logprobs=2), hold=True)
    silent = engine.submit(prompt, SamplingParams(6), hold=True)
    run([asked, silent])
    (_, best), (second, runner_up) = asked.logprobs[-1].top
    unlisted = next(t for t in range(256) if t not in dict(asked.logprobs[-1].top))

    def fork(parent, number, **options):
        handle = parent.fork(SamplingParams(8, logprobs=number), **options)
        assert len(handle.result().tokens) == 8
        return [one.chosen for one in handle.logprobs]

    known = [one.chosen for one in asked.logprobs]
    assert known[-1] == pytest.approx(best, abs=1e-5)
    same = fork(asked, 2)
    assert same[:6] == known
    assert len(same) == 8
    other = fork(asked, 2, next_token=second)
    assert other[:6] == [*known[:5], runner_up]
    assert np.isnan(fork(asked, 2, next_token=unlisted)).tolist() == 5 * [False] + [True] + 2 * [
        False
    ]
    assert np.isnan(fork(silent, 2)).tolist() == 6 * [True] + 2 * [False]
    assert fork(asked, None) == []
    for handle in (asked, silent):
        handle.release()
    assert_all_returned(engine)


def test_sampled_forks_differ_and_can_be_repeated():
    [prompt] = token_tree((1, 40))

    def tokens():
        engine = make_engine()
        parent = engine.submit(prompt, SamplingParams(24, temperature=1.5, seed=5))
        while len(parent.tokens) < 8:
            engine.step()
        count = len(parent.tokens)
        return count, run([parent, parent.fork(), parent.fork()])

    count, branches = tokens()
    assert len({tuple(branch[:count]) for branch in branches}) == 1
    assert len({tuple(branch) for branch in branches}) == 3
    assert tokens() == (count, branches)


def test_forks_samples_and_forks_of_forks_all_have_seeds_of_their_own():
    engine = make_engine()
    samples = engine.submit_samples([1, 2, 3], SamplingParams(4, n=3))
    handles = [*samples, engine.submit([1, 2, 3], SamplingParams(4, seed=2**32 - 1))]
    for parent in list(handles):
        children = [parent.fork() for _ in range(3)]
        handles += [*children, *(child.fork() for child in children for _ in range(2))]
    assert len({handle.params.seed for handle in handles}) == len(handles) == 4 + 4 * 9
    for handle in handles:
        handle.abort()
    assert_all_returned(engine)


def test_the_text_of_a_fork_begins_with_its_parents():
    engine = make_engine(tokenizer=BytePairs())
    parent = engine.submit("once upon", SamplingParams(12))
    while len(parent.tokens) < 5:
        engine.step()
    child = parent.fork()
    events = list(child.stream())
    assert child.result().text == parent.result().text
    assert "".join(event.text for event in events) == child.text[-len(events[0].text) :] or (
        child.text.endswith("".join(event.text for event in events))
    )


def test_forks_that_cannot_go_on_are_refused():
    [prompt] = token_tree((1, 20))
    free = greedy_without_cache(prompt, 4)
    engine = make_engine(stop_tokens=[free[3]])
    parent = engine.submit(prompt, SamplingParams(9))
    with pytest.raises(InvalidRequest, match="there is none yet"):
        parent.fork(next_token=3)
    with pytest.raises(InvalidRequest, match="fork starts one, n is 4"):
        parent.fork(SamplingParams(9, n=4))
    run([parent])
    if parent.finish_reason == "stop":
        with pytest.raises(InvalidRequest, match="needs a next_token"):
            parent.fork(SamplingParams(20))
    with pytest.raises(InvalidRequest, match="next_token has token id 999"):
        parent.fork(SamplingParams(20), next_token=999)
    with pytest.raises(InvalidRequest, match="max_tokens is 1"):
        parent.fork(SamplingParams(1), next_token=5)
    assert engine.stats.submitted == 1
    assert_all_returned(engine)


def test_the_tails_of_all_samples_are_copied_together(monkeypatch):
    """Each dispatch takes as long as decoding a token: 15 samples of a group took 15 of them."""
    copied = []
    copying = Invocations.copying

    def spy(self, state, copies, *windowed):
        copied.append(len(copies))
        return copying(self, state, copies, *windowed)

    monkeypatch.setattr(Invocations, "copying", spy)
    engine = make_engine()
    [group] = engine.generate([[1, 2, 3] * 7], SamplingParams(4, n=16, temperature=1.0, seed=0))
    assert copied == [8, 7]
    one = engine.submit([1, 2, 3] * 7, SamplingParams(4, temperature=1.0, seed=0)).result()
    assert group.samples[0].tokens == one.tokens
    assert len({sample.tokens for sample in group.samples}) == 16
