"""Holding requests that run, and ending a request with all that was forked from it."""

from __future__ import annotations

import functools
import gc
import signal
from weakref import ref

import pytest

from jax_chunkattn import PoolExhausted, SamplingParams
from jax_chunkattn.engine.lineage import Lineage
from jax_chunkattn.engine.scheduler import Scheduler
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_interrupts import Interrupt, handling, interrupted_at
from tests.jax_chunkattn.engine.test_threads import start
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

[PROMPT] = token_tree((1, 40))
LONG = SamplingParams(300)


@functools.cache
def right() -> list[int]:
    """What a model without a cache answers."""
    return greedy_without_cache(PROMPT, 40)


def family(engine, generations=4):
    """A chain of forks, each with a fork beside it that goes on; and a request of no kin."""
    chain = [engine.submit(PROMPT, LONG, hold=True)]
    beside = []
    while len(chain) < generations:
        engine.step()
        beside.append(chain[-1].fork(SamplingParams(len(chain[-1].tokens) + 9), hold=True))
        chain.append(chain[-1].fork(hold=len(chain) % 2 == 0))
    return chain, beside, engine.submit(PROMPT, SamplingParams(40))


def assert_done(handles):
    assert {handle.state for handle in handles} == {"done"}
    assert {handle.finish_reason for handle in handles} <= {"abort", "length"}


@pytest.mark.parametrize("steps", [0, 9])
def test_pruning_ends_a_request_and_all_forks_of_forks(steps):
    """Those that run, wait, have ended, and are held; and nobody else."""
    engine = make_engine(max_running=5)
    chain, beside, other = family(engine)
    for _ in range(steps):
        engine.step()
    lengths = [len(handle.tokens) for handle in chain]
    chain[1].prune()
    engine.check()
    assert_done([*chain[1:], *beside[1:]])
    assert [len(handle.tokens) for handle in chain] == lengths
    assert not chain[0].done
    assert run([beside[0], other]) == [right()[: len(beside[0].tokens)], right()]
    chain[0].prune()
    chain[0].prune()
    assert_done([*chain, *beside])
    assert_all_returned(engine)


def test_forks_made_after_pruning_live_on():
    engine = make_engine()
    parent = engine.submit(PROMPT, LONG)
    while len(parent.tokens) < 5:
        engine.step()
    parent.prune()
    child = parent.fork(SamplingParams(40))
    assert run([child]) == [right()]
    assert_all_returned(engine)


def test_samples_of_one_prompt_are_no_kin():
    engine = make_engine()
    first, second, third = engine.submit_samples(PROMPT, SamplingParams(12, n=3))
    first.prune()
    assert first.finish_reason == "abort"
    assert run([second, third]) == [right()[:12]] * 2
    assert_all_returned(engine)


def test_forks_are_found_through_those_that_are_gone():
    """The fork in the middle has ended and nobody has it any more."""
    engine = make_engine()
    first = engine.submit(PROMPT, LONG)
    while not first.tokens:
        engine.step()
    middle = first.fork(SamplingParams(40))
    last = middle.fork(LONG)
    middle.result()
    gone = ref(middle._request)
    del middle
    for _ in range(3):  # until what is on its way for it has come
        engine.step()
    gc.collect()
    assert gone() is None, "its lineage keeps a request that nobody has"
    first.prune()
    assert last.finish_reason == "abort"
    assert_all_returned(engine)


def test_a_thousand_generations_are_pruned_at_once():
    engine = make_engine()
    chain = [engine.submit(PROMPT, SamplingParams(1), hold=True)]
    chain[0].result()
    for _ in range(1000):
        chain.append(chain[-1].fork(SamplingParams(2)))
    assert engine.stats.waiting == 1000
    chain[0].prune()
    assert_done(chain)
    assert_all_returned(engine)


class Owner:
    """What a lineage asks of a request."""

    def __init__(self, parent: Owner | None = None):
        self.lineage = Lineage(self)
        if parent is not None:
            self.lineage.fork_from(parent.lineage)


def test_forking_the_last_fork_for_ever_takes_no_more_memory():
    last = root = Owner()
    for _ in range(1000):
        last = Owner(last)
    length, lineage = 0, last.lineage
    while lineage is not None:
        length, lineage = length + 1, lineage._parent
    assert length <= 3
    assert root.lineage.family([last, Owner()]) == [last]


def test_a_long_chain_of_forks_can_be_asked_and_forgotten():
    chain = [Owner()]
    for _ in range(20_000):
        chain.append(Owner(chain[-1]))
    assert chain[10_000].lineage.family(chain) == chain[10_000:]
    last = chain[-1]
    del chain
    gc.collect()
    assert last.lineage.family([last]) == [last]
    del last


def test_callbacks_may_prune_and_are_told_when_all_have_ended():
    engine = make_engine()
    seen = []

    def on_event(event):
        if event.finish_reason == "abort":
            seen.append([handle.done for handle in (parent, child, other)])
            child.prune()
            assert engine.stats.aborted == 2
        elif len(parent.tokens) > 12:
            parent.prune()

    parent = engine.submit(PROMPT, LONG, on_event=on_event)
    while not parent.tokens:
        engine.step()
    child = parent.fork()
    other = engine.submit([1, 2, 3], LONG)
    while not parent.done:
        engine.step()
    assert seen == [[True, True, False]]
    other.abort()
    assert_all_returned(engine)


def test_threads_may_prune_what_others_wait_for():
    engine = make_engine()
    parent = engine.submit(PROMPT, LONG)
    while not parent.tokens:
        engine.step()
    children = [parent.fork() for _ in range(3)]
    reasons = []

    def wait(child):
        reasons.append(child.result().finish_reason)

    join = start(*(lambda child=child: wait(child) for child in children), parent.prune)
    join()
    assert reasons == ["abort"] * 3
    assert_all_returned(engine)


def test_a_handler_that_interrupts_the_engine_prunes_at_the_next_turn(monkeypatch):
    engine = make_engine()
    parent = engine.submit(PROMPT, LONG)
    while not parent.tokens:
        engine.step()
    child = parent.fork()
    reserve, states = Scheduler.reserve, []

    def reserve_and_signal(*args):
        if not states:
            signal.raise_signal(signal.SIGALRM)
        return reserve(*args)

    def handler():
        parent.prune()
        states.append((parent.done, child.done))

    monkeypatch.setattr(Scheduler, "reserve", reserve_and_signal)
    with handling(handler):
        engine.step()
    assert states == [(False, False)]
    assert engine.has_work
    engine.step()
    assert_done([parent, child])
    assert_all_returned(engine)


def test_a_prune_that_ctrl_c_breaks_off_is_completed_by_the_next_turn():
    """Wherever in it the interrupt comes."""
    engine = make_engine(max_running=4)
    broken_off = number = 0
    while True:
        number += 1
        parent = engine.submit(PROMPT, LONG, hold=True)
        while not parent.tokens:
            engine.step()
        handles = [parent, parent.fork(), parent.fork(SamplingParams(9), hold=True)]
        handles.append(handles[1].fork(hold=True))
        function = interrupted_at(number, parent.prune)
        if function is None:
            break
        ended = [handle.done for handle in handles]
        broken_off += any(ended) and not all(ended)
        stats = engine.stats  # takes a turn
        if number > 4:  # the fourth function called leaves word for the next turn
            assert_done(handles)
            assert (stats.running, stats.waiting, stats.held) == (0, 0, 0), function
        engine.check()
        parent.prune()
    assert broken_off > 3
    assert number > 20
    assert_all_returned(engine)


def test_an_interrupt_that_a_callback_raises_keeps_nobody_from_being_pruned():
    engine = make_engine()

    def on_event(event):
        if event.finish_reason == "abort":
            raise Interrupt

    parent = engine.submit(PROMPT, LONG, on_event=on_event)
    while not parent.tokens:
        engine.step()
    child = parent.fork()
    with pytest.raises(Interrupt):
        parent.prune()
    assert_done([parent, child])
    engine.step()
    assert_all_returned(engine)


def test_a_request_that_runs_can_be_held():
    engine = make_engine()
    samples = engine.submit_samples(PROMPT, SamplingParams(9, n=2))
    assert samples[0].hold()
    assert run(samples) == [right()[:9]] * 2
    assert engine.stats.held == 1
    assert samples[0].hold(), "it is held already"
    assert not samples[1].hold(), "it has ended and let go"
    computed = engine.stats.prefill_tokens
    assert run([samples[0].fork(SamplingParams(20))]) == [right()[:20]]
    assert engine.stats.prefill_tokens == computed
    samples[0].release()
    assert not samples[0].hold()
    assert_all_returned(engine)


def test_what_is_held_gives_way_to_those_who_run():
    """However it came to be held."""
    engine = make_engine(num_chunks=10)
    handle = engine.submit(PROMPT, SamplingParams(9))
    assert handle.hold()
    handle.result()
    assert run([engine.submit([7] * 100, SamplingParams(40))])
    assert engine.stats.held == 0
    assert not handle.hold()
    with pytest.raises(PoolExhausted):
        handle.fork(SamplingParams(400))
    assert run([handle.fork(SamplingParams(20))]) == [right()[:20]]
    assert_all_returned(engine)
