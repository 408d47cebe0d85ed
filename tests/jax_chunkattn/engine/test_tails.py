"""Forks where full chunks are encoded: the exact last chunk is copied from slot to slot."""

from __future__ import annotations

import pytest

from jax_chunkattn import Beam, NextTokens, Puct, SamplingParams, beam_search, tree_search
from jax_chunkattn.engine.tails import Tails
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.rule.features import MARKED
from tests.jax_chunkattn.toy import token_tree

SLOTS = 16
[PROMPT, *OTHERS] = token_tree((1, 37), (SLOTS + 1, 15), seed=8)  # three chunks and a quarter


def make(**options):
    return make_engine(codec=MARKED, max_running=SLOTS, **options)


def answer_to(tokens, number):
    """Greedy, by an engine that has computed nothing else."""
    return run([make().submit(tokens, SamplingParams(number))])[0]


def branches(parent, count):
    """Forks that each go on behind another token, for eight tokens more."""
    *begin, last = parent.tokens
    tokens = [(last + 1 + offset) % 256 for offset in range(count)]
    params = SamplingParams(len(begin) + 9)
    return [(parent.fork(params, next_token=token, hold=True), [*begin, token]) for token in tokens]


@pytest.mark.parametrize("length", [5, 12, 13, 14, 21])  # in the chunk, at its end, behind it
def test_branches_compute_nothing_again(length):
    engine = make()
    parent = engine.submit(PROMPT, SamplingParams(length), hold=True)
    run([parent])
    computed = engine.stats.prefill_tokens
    for fork, begin in branches(parent, 2):
        assert run([fork]) == [begin + answer_to([*PROMPT, *begin], 8)]
        fork.release()
    assert engine.stats.prefill_tokens == computed == len(PROMPT)
    parent.release()
    assert_all_returned(engine)


@pytest.mark.slow
def test_every_slot_may_be_copied_from_and_to_at_once():
    """All parents have ended, so their forks are given the slots that their tails lie in."""
    engine = make()
    parents = [
        engine.submit(other, SamplingParams(3 + n % 5), hold=True) for n, other in enumerate(OTHERS)
    ]
    run(parents)
    computed = engine.stats.prefill_tokens
    forks = [branches(parent, 1)[0] for parent in reversed(parents)]
    for (fork, begin), prompt in zip(forks, reversed(OTHERS), strict=True):
        assert run([fork]) == [begin + answer_to([*prompt, *begin], 8)]
    assert engine.stats.prefill_tokens == computed


@pytest.mark.slow
def test_a_tail_that_another_request_has_written_over_is_computed_again():
    engine = make()
    parent = engine.submit(PROMPT, SamplingParams(6), hold=True)
    run([parent])
    run([engine.submit(other, SamplingParams(2)) for other in OTHERS])  # in all slots
    computed = engine.stats.prefill_tokens
    [(fork, begin)] = branches(parent, 1)
    assert run([fork]) == [begin + answer_to([*PROMPT, *begin], 8)]
    assert engine.stats.prefill_tokens - computed == (len(PROMPT) + 5) % 16


@pytest.mark.slow
def test_a_tail_that_its_parent_has_left_behind_is_computed_again():
    """The fork waits for a slot while its parent decodes into the next chunk."""
    engine = make()
    parent = engine.submit(PROMPT, SamplingParams(40))
    mates = [engine.submit(other, SamplingParams(24)) for other in OTHERS[1:]]
    while len(parent.tokens) < 4:
        engine.step()
    computed = engine.stats.prefill_tokens
    fork = parent.fork(SamplingParams(40))
    begin = len(fork.tokens)
    run(mates)
    assert len(parent.tokens) > 16
    assert run([fork, parent]) == 2 * [answer_to(PROMPT, 40)]
    assert engine.stats.prefill_tokens - computed == (len(PROMPT) + begin - 1) % 16


@pytest.mark.slow
def test_a_fork_of_a_waiting_fork_waits_for_a_tail_too():
    """It comes in together with its parent, whose tail is not in the parent's slot yet."""
    engine = make()
    parent = engine.submit(PROMPT, SamplingParams(9))
    while len(parent.tokens) < 3:
        engine.step()
    child = parent.fork(SamplingParams(30))
    grandchild = child.fork(SamplingParams(30))
    expected = answer_to(PROMPT, 30)
    assert run([parent, child, grandchild]) == [expected[:9], expected, expected]
    assert_all_returned(engine)


def test_beams_prefill_their_prompt_alone(monkeypatch):
    engine = make()
    found = beam_search(engine, PROMPT, beams=4, max_tokens=20)
    assert engine.stats.prefill_tokens == len(PROMPT)
    assert_all_returned(engine)

    computing = make()
    monkeypatch.setattr(Tails, "to_begin_with", lambda self, fork: None)
    again = beam_search(computing, PROMPT, beams=4, max_tokens=20)
    assert computing.stats.prefill_tokens > 10 * len(PROMPT)
    assert [one.tokens for one in found] == [one.tokens for one in again]
    for one, other in zip(found, again, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_leaves_of_a_tree_whose_tails_are_gone_compute_them_again(monkeypatch):
    """There are more leaves than slots; the tree is as if each had been computed by itself."""

    def search(select):
        engine = make()
        tree = tree_search(
            engine, PROMPT, expand=NextTokens(3), select=select, num_simulations=20, max_tokens=20
        )
        assert_all_returned(engine)
        return tree, engine.stats.prefill_tokens - len(PROMPT)

    assert search(Beam(3))[1] == 0
    tree, computed = search(Puct())
    assert computed > 0
    monkeypatch.setattr(Tails, "to_begin_with", lambda self, fork: None)
    again, by_itself = search(Puct())
    assert by_itself > computed
    assert tree.parents.tolist() == again.parents.tolist()
    assert tree.tokens.tolist() == again.tokens.tolist()
    assert tree.values == pytest.approx(again.values, abs=1e-4)
