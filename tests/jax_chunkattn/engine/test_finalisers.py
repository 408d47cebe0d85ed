"""What is dropped is given up without waiting for anything, wherever the interpreter finds it.

From Python 3.12 on garbage is collected between any two bytecodes, those of a turn included.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jax_chunkattn import SamplingParams
from jax_chunkattn.engine.lock import FairLock
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_threads import TIMEOUT, start
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

[PROMPT] = token_tree((1, 20))
ROUNDS = 3


@functools.cache
def right() -> list[int]:
    """What a model without a cache answers."""
    return greedy_without_cache(PROMPT, 30)


class Holder:
    """A web handler, say: keeps its stream, and something refers back to it."""


def drop_in_a_cycle(engine):
    """A stream, and answers, that only the collector finds to be dropped."""
    holder = Holder()
    holder.events = engine.submit(PROMPT, SamplingParams(30)).stream()  # type: ignore[attr-defined]
    holder.outputs = engine.generate([PROMPT], SamplingParams(30, n=2))  # type: ignore[attr-defined]
    holder.itself = holder  # type: ignore[attr-defined]


@contextmanager
def collecting_at_every_allocation() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def test_streams_that_die_in_cycles_block_nobody():
    """One thread is enough to wait for itself."""
    engine = make_engine(max_running=4)
    run([engine.submit(PROMPT, SamplingParams(30)) for _ in range(4)])

    def serve():
        with collecting_at_every_allocation():
            for _ in range(ROUNDS):
                drop_in_a_cycle(engine)
                assert run([engine.submit(PROMPT, SamplingParams(30))]) == [right()]

    start(serve)()
    gc.collect()
    assert_all_returned(engine)
    stats = engine.stats
    assert stats.finished + stats.aborted == stats.submitted == 4 + 4 * ROUNDS


def test_streams_found_dropped_in_the_midst_of_a_turn_are_aborted_by_the_next(monkeypatch):
    engine = make_engine()
    insert = PrefixTree.insert

    def collect_and_insert(*args, **kwargs):
        gc.collect()
        return insert(*args, **kwargs)

    gc.disable()
    try:
        drop_in_a_cycle(engine)
        monkeypatch.setattr(PrefixTree, "insert", collect_and_insert)
        handle = engine.submit(PROMPT, SamplingParams(30))
        engine.step()
        assert engine.stats.aborted == 3
        assert run([handle]) == [right()]
    finally:
        gc.enable()
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_finaliser_that_uses_the_engine_never_waits_for_its_own_thread(threads):
    """Such as a user's own, whatever it does: those of the engine only leave word."""
    lock = FairLock()
    rounds = [0] * threads

    class Finalised:
        def __del__(self):
            lock.run(lambda: None)

    def work(index):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            one = Finalised()
            one.itself = one  # type: ignore[attr-defined]
            del one
            lock.run(lambda: rounds.__setitem__(index, rounds[index] + 1))

    with collecting_at_every_allocation():
        start(*(lambda index=index: work(index) for index in range(threads)))()
    assert min(rounds) > 10


def test_dropping_waits_for_no_other_thread():
    """A user's lock may be held meanwhile, and wanted by the callback of the thread at work."""
    engine = make_engine()
    users_lock, at_work, done = threading.Lock(), threading.Event(), threading.Event()

    def on_event(_):
        at_work.set()
        with users_lock:
            pass

    dropped = engine.submit(PROMPT, SamplingParams(30))

    def drop():
        at_work.wait(TIMEOUT)
        del_me = [dropped.stream()]
        del_me.clear()
        done.set()

    def work():
        engine.submit(PROMPT, SamplingParams(30), on_event=on_event).result()

    with users_lock:
        join = start(drop, work)
        assert done.wait(TIMEOUT)
        assert (dropped.finish_reason, dropped.state, dropped.done) == ("abort", "done", True)
    join()
    assert engine.stats.aborted == 1
    assert_all_returned(engine)


def test_what_is_dropped_takes_no_more_tokens_and_tells_so():
    told = []
    engine = make_engine()
    handle = engine.submit(PROMPT, SamplingParams(30), on_event=told.append)
    for _ in handle.stream():
        break
    tokens = handle.tokens
    assert engine.has_work
    assert told[-1].finish_reason is None
    engine.run()
    assert handle.tokens == tokens == sum((event.tokens for event in told), ())
    assert told[-1].finish_reason == "abort"
    assert not engine.has_work
    assert_all_returned(engine)


def test_an_engine_dies_with_streams_and_answers_half_read():
    engine = make_engine()
    events, outputs = engine.submit(PROMPT).stream(), engine.generate([PROMPT] * 2)
    next(events)
    next(outputs)
    cycle = [engine, events, outputs]
    cycle.append(cycle)
    del engine, events, outputs, cycle
    gc.collect()
