"""Ctrl-C anywhere, and handlers of signals that use the engine: nothing is lost, nobody waits."""

from __future__ import annotations

import functools
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from jax_chunkattn import EngineClosed, RequestFailed, SamplingParams
from jax_chunkattn.device.device import Device
from jax_chunkattn.engine.lock import FairLock
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.tree.allocator import ChunkAllocator
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.effort import examples
from tests.jax_chunkattn.engine.behind import prefix_of
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_threads import start
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of POSIX here"),
    # Where an interrupt meets a finaliser or a callback of JAX's, Python can only print it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PROMPTS = token_tree((1, 40), (4, 9))
PARAMS = SamplingParams(24, logprobs=1)


@functools.cache
def right() -> list[list[int]]:
    """What a model without a cache answers."""
    return [greedy_without_cache(prompt, 24) for prompt in PROMPTS]


class Interrupt(BaseException):
    """As KeyboardInterrupt, but that pytest does not end for it."""


@contextmanager
def handling(handler):
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt():
    raise Interrupt


def interrupt_again_and_again(work, times, longest):
    """Runs `work` until it has been interrupted so often, each time at another moment; returns how
    often it came to its end."""
    ended = 0
    clock = random.Random(0)
    with handling(interrupt):
        for _ in range(times):
            try:
                try:
                    # Again, if it comes where nothing can be raised: in a finaliser of JAX's, say.
                    signal.setitimer(signal.ITIMER_REAL, clock.uniform(2e-5, longest), 0.1)
                    while True:
                        work()
                        ended += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
    return ended


def is_free(lock):
    """Whether another thread gets it at once."""
    got = []
    thread = threading.Thread(target=lambda: lock.run(lambda: got.append(1)), daemon=True)
    thread.start()
    thread.join(10)
    return bool(got)


@pytest.mark.parametrize("turns", [0, 1000])
def test_a_lock_is_free_after_an_interrupt_wherever_it_came(turns):
    lock = FairLock()
    entered = 0

    def work():
        nonlocal entered
        entered += 1
        for _ in range(turns):
            pass

    for _ in range(30):
        interrupt_again_and_again(lambda: lock.run(work), 100, 2e-4)
        assert is_free(lock)
    assert entered > 3000


def test_a_lock_is_free_after_an_interrupt_of_a_thread_that_waits():
    lock = FairLock()
    stopped = threading.Event()

    def keep_taking():
        while not stopped.is_set():
            lock.run(lambda: time.sleep(2e-4))

    join = start(keep_taking, keep_taking)
    for _ in range(5):
        interrupt_again_and_again(lambda: lock.run(lambda: None), 100, 1e-3)
        assert is_free(lock)
    stopped.set()
    join()


def test_ctrl_c_in_an_idle_loop_leaves_engine_and_cache_as_they_were():
    engine = make_engine()
    run([engine.submit(PROMPTS[0], SamplingParams(4))])
    cached = engine.stats.chunks_cached
    ended = interrupt_again_and_again(engine.step, 3000, 2e-4)
    assert ended > 3000
    start(engine.check)()
    assert engine.stats.recoveries == 0
    assert engine.stats.chunks_cached == cached > 0
    assert_all_returned(engine)


@pytest.mark.parametrize(
    "rounds", [2, pytest.param(8, marks=[pytest.mark.slow, pytest.mark.thorough])]
)
def test_ctrl_c_at_any_moment_of_the_work_loses_nothing(rounds):
    """Each request's tokens, text, log-probabilities and events are whole and in their order."""
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3, tokenizer=BytePairs())
    assert run([engine.submit(prompt, PARAMS) for prompt in PROMPTS]) == right()
    told = [[] for _ in PROMPTS]
    interrupts = 0
    clock = random.Random(1)
    for _ in range(rounds):
        handles = [
            engine.submit(prompt, PARAMS, on_event=events.append)
            for prompt, events in zip(PROMPTS, told, strict=True)
        ]
        longest = 1e-2
        with handling(interrupt):
            while not all(handle.done for handle in handles):
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, clock.uniform(1e-3, longest), 0.3)
                        engine.run()
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupt:
                    interrupts += 1
                    longest *= 1.02  # a machine of any speed gets to the end
        for handle, expected in zip(handles, right(), strict=True):
            answer = handle.result()
            assert list(answer.tokens) == expected
            assert answer.text == bytes(expected).decode(errors="replace")
            assert len(answer.logprobs) == len(expected)
            events = list(handle.stream())
            assert sum((event.tokens for event in events), ()) == answer.tokens
            assert "".join(event.text for event in events) == answer.text
            assert sum((event.logprobs for event in events), ()) == answer.logprobs
            assert [event.finish_reason for event in events].count("length") == 1
        start(engine.check)()
    assert interrupts > 100
    assert engine.stats.recoveries > 10
    assert_all_returned(engine)


def test_ctrl_c_while_work_is_handed_in_leaves_none_behind():
    """No request runs of which nobody has the handle."""
    engine = make_engine(max_running=4)
    params = SamplingParams(900)

    def hand_in():
        engine.generate([*PROMPTS, *PROMPTS], params).close()
        engine.submit(PROMPTS[0], params).abort()
        engine.pin(PROMPTS[0]).release()

    interrupt_again_and_again(hand_in, 300, 3e-3)
    engine.check()
    stats = engine.stats
    assert (stats.running, stats.held) == (0, 0)
    assert stats.aborted > 100
    # What was lost on its way from `return` to the caller's variable, no more.
    assert stats.waiting + stats.pinned < 10
    engine.close()
    assert_all_returned(engine)


def test_a_signals_handler_may_abort_and_close_and_no_more():
    """It runs between two bytecodes of whatever the engine does."""
    engine = make_engine()
    done = {"refused": 0, "aborted": 0}
    victims = []

    def handler():
        assert engine.stats.submitted >= len(victims)
        if victims:
            victims.pop().abort()
            done["aborted"] += 1
        try:
            engine.step()
        except RuntimeError:
            done["refused"] += 1

    with handling(handler):
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        for _ in range(60):
            victims.append(engine.submit(PROMPTS[1], SamplingParams(300)))
            assert run([engine.submit(PROMPTS[0], SamplingParams(24))]) == [right()[0]]
    while victims:
        victims.pop().abort()
    assert min(done.values()) > 10
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


def test_a_signals_handler_may_close_the_engine_at_work():
    engine = make_engine()
    handle = engine.submit(PROMPTS[0], SamplingParams(900))
    with handling(engine.close):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises((RequestFailed, EngineClosed), match="closed"):
            handle.result()
    assert handle.finish_reason == "error"
    assert_all_returned(engine)


def test_a_handler_in_the_midst_of_a_failing_callbacks_request_waits_for_the_next_turn(monkeypatch):
    """The callback is over then: the tree changes."""
    engine = make_engine()
    free, refused = ChunkAllocator.free, []

    def free_and_signal(self, chunks):
        if chunks and fussy.error is not None and not refused:
            signal.raise_signal(signal.SIGALRM)
        return free(self, chunks)

    def handler():
        try:
            engine.check()
        except RuntimeError:
            refused.append(1)
        other.abort()

    def fail(event):
        raise ZeroDivisionError

    fussy = engine.submit(PROMPTS[0], PARAMS, on_event=fail)
    other = engine.submit(PROMPTS[1], PARAMS)
    monkeypatch.setattr(ChunkAllocator, "free", free_and_signal)
    with handling(handler):
        engine.run()
    assert refused == [1]
    assert (fussy.finish_reason, other.finish_reason) == ("error", "abort")
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


def test_a_reader_refused_in_a_handler_goes_on_after_it(monkeypatch):
    engine = make_engine()
    events = engine.submit(PROMPTS[0], PARAMS).stream()
    insert, refused = PrefixTree.insert, []

    def insert_and_signal(*args, **kwargs):
        signal.raise_signal(signal.SIGALRM)
        return insert(*args, **kwargs)

    def handler():
        with pytest.raises(RuntimeError, match="interrupted it at work"):
            next(events)
        refused.append(1)

    monkeypatch.setattr(PrefixTree, "insert", insert_and_signal)
    with handling(handler):
        engine.step()
    assert refused
    assert [token for event in events for token in event.tokens] == right()[0]


def test_an_engine_whose_pool_cannot_be_had_after_ctrl_c_can_be_read_and_closed(monkeypatch):
    engine = make_engine()
    handle = engine.submit(PROMPTS[0], PARAMS)
    append = PrefixTree.append

    def interrupted(*_):
        raise Interrupt

    def out_of_memory(_):
        raise MemoryError("no room for a pool")

    monkeypatch.setattr(PrefixTree, "append", interrupted)
    with pytest.raises(Interrupt):
        engine.run()
    monkeypatch.setattr(PrefixTree, "append", append)
    with monkeypatch.context() as patch:
        patch.setattr(Device, "_allocate", out_of_memory)
        assert engine.stats.failed == 1
        handle.release()
        with pytest.raises(RequestFailed, match="no room for a pool"):
            handle.result()
        engine.check()
    assert run([engine.submit(PROMPTS[0], PARAMS)]) == right()[:1]
    engine.close()
    assert_all_returned(engine)


def test_what_ctrl_c_ended_half_way_can_still_be_forked(monkeypatch):
    engine = make_engine()
    handle = engine.submit(PROMPTS[0], PARAMS, hold=True)
    vacate = Scheduler._vacate

    def interrupted(self, work):
        monkeypatch.setattr(Scheduler, "_vacate", vacate)
        raise Interrupt

    monkeypatch.setattr(Scheduler, "_vacate", interrupted)
    with pytest.raises(Interrupt):
        engine.run()
    assert list(handle.result().tokens) == right()[0]
    fork = handle.fork(SamplingParams(40))
    assert list(fork.result().tokens) == greedy_without_cache(PROMPTS[0], 40)
    assert_all_returned(engine)


@pytest.mark.slow
def test_eight_threads_signals_and_dropped_iterators_hang_nowhere():
    """Half a minute of all at once; what is read to its end is right."""
    engine = make_engine(num_chunks=40, prefill_tokens=32, max_running=6)
    engine.warm_up()
    end = time.monotonic() + examples(30, 60)
    counts = [0] * 9

    class Holder:
        pass

    def client(number):
        clock = random.Random(number)
        while time.monotonic() < end:
            index = clock.randrange(len(PROMPTS))
            prompt, expected = PROMPTS[index], right()[index]
            holder = Holder()
            holder.itself = holder  # type: ignore[attr-defined]
            holder.events = engine.submit(prompt, SamplingParams(90)).stream()  # type: ignore[attr-defined]
            holder.outputs = engine.generate([prompt] * 2, SamplingParams(40))  # type: ignore[attr-defined]
            if clock.random() < 0.5:
                next(holder.events)  # type: ignore[attr-defined]
            del holder
            handle = engine.submit(prompt, SamplingParams(24))
            if clock.random() < 0.3:
                tokens = [token for event in handle.stream() for token in event.tokens]
            else:
                tokens = list(handle.result().tokens)
            assert tokens == expected
            counts[number] += 1

    join = start(*(lambda number=number: client(number) for number in range(8)))
    with handling(interrupt):
        clock = random.Random(8)
        while time.monotonic() < end:
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, clock.uniform(1e-3, 0.1), 0.5)
                    while time.monotonic() < end:
                        assert run([engine.submit(PROMPTS[0], SamplingParams(24))]) == right()[:1]
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                counts[8] += 1
    join()
    print(sys.version.split()[0], counts, engine.stats)
    assert min(counts) > 3
    while engine.step():
        pass
    engine.check()
    assert engine.stats.failed == 0


def interrupted_at(number, call):
    """Makes a call, interrupted where it enters a function of the library for the `number`-th time;
    returns that function's name, or None if the call came to its end before."""
    entered = []

    def trace(frame, event, _):
        if frame.f_globals.get("__name__", "").startswith("jax_chunkattn."):
            entered.append(frame.f_code.co_qualname)
            if len(entered) == number:
                sys.settrace(None)
                raise Interrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return entered[-1]
    finally:
        sys.settrace(before)
    return None


@pytest.mark.parametrize("name", ["pin", "add_prefix", "submit", "submit_samples", "fork"])
def test_what_an_interrupt_keeps_from_its_caller_is_left_to_nobody(name):
    """Wherever in the call it comes: no prefix stays pinned, no request is decoded to its end."""
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    prompt = PROMPTS[0]
    parent = engine.submit(prompt, SamplingParams(2))
    parent.result()
    call = {
        "pin": lambda: engine.pin(prompt),
        "add_prefix": lambda: engine.add_prefix("its name stays free", *prefix_of(32)),
        "submit": lambda: engine.submit(prompt, SamplingParams(9)),
        "submit_samples": lambda: engine.submit_samples(prompt, SamplingParams(9, n=2)),
        "fork": lambda: parent.fork(SamplingParams(9)),
    }[name]
    left, number = [], 1
    while True:
        finished = engine.stats.finished
        function = interrupted_at(number, call)
        engine.run()
        stats = engine.stats
        if function is None:
            break
        if stats.pinned or stats.finished > finished:
            left.append((number, function))
        engine.check()
        engine.reset()
        number += 1
    assert number > 20
    assert stats.pinned or stats.finished > finished, "it did nothing when it was not interrupted"
    assert left == []
