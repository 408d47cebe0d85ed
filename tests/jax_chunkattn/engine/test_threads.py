"""Many threads at one engine: all get their tokens, nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from jax_chunkattn import EngineClosed, RequestFailed, SamplingParams
from jax_chunkattn.engine.lock import FairLock
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine
from tests.jax_chunkattn.engine.oracle import Agreement
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

PROMPTS = token_tree((1, 40), (4, 9)) + token_tree((2, 20), seed=1)
TIMEOUT = 120  # seconds; compiling is part of it


def small_engine(**options):
    options = {"prefill_tokens": 32, "max_running": 3, **options}
    return make_engine(num_chunks=10, **options)


def dawdle(_):
    """An `on_event` that leaves other threads the time to come in between."""
    time.sleep(0.03)


def start(*functions: Callable[[], None]) -> Callable[[], None]:
    """Runs each in a thread; what is returned waits for all and raises what one has raised."""
    errors: list[BaseException] = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions
    ]
    for thread in threads:
        thread.start()

    def join():
        deadline = time.monotonic() + TIMEOUT
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a thread still waits"

    return join


def test_threads_that_submit_stream_fork_and_abort_at_once_all_get_their_tokens():
    """In a pool that is too small for them."""
    engine = small_engine()
    done, lock = [], threading.Lock()

    def client(number):
        for turn in range(6):
            prompt = PROMPTS[(number + turn) % len(PROMPTS)]
            params = SamplingParams(20, temperature=turn % 2, seed=10 * number + turn)
            called = []
            handle = engine.submit(prompt, params, on_event=called.append)
            match (number + turn) % 5:
                case 0:
                    events = list(handle.stream())
                    assert sum((event.tokens for event in events), ()) == handle.tokens
                case 1:
                    assert handle.result().tokens == handle.tokens
                case 2:
                    for event in handle.stream():
                        if event.tokens:
                            break
                    # Others may have advanced it to its end before this one broke off.
                    assert handle.finish_reason in ("abort", "length")
                case 3:
                    child = handle.fork(params)
                    assert child.result().finish_reason == "length"
                    with lock:
                        done.append(child)
                    assert handle.result().finish_reason == "length"
                case 4:
                    engine.step()
                    handle.abort()
            assert handle.done
            assert sum((event.tokens for event in called), ()) == handle.tokens
            with lock:
                done.append(handle)
            engine.check()

    start(*(lambda number=number: client(number) for number in range(6)))()
    agreement = Agreement()
    for handle in done:
        if handle.tokens:
            agreement.check_tokens(handle.prompt, handle.params, handle.tokens)
    assert len(done) >= 36
    assert agreement.tokens > 300
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


def test_one_thread_can_advance_the_engine_for_all():
    engine = small_engine()
    closed = threading.Event()

    def advance():
        while not closed.is_set():
            if not engine.step():
                time.sleep(0.001)

    def client(prompt):
        events = engine.submit(prompt, params).stream()
        tokens = [token for event in events for token in event.tokens]
        assert tokens == greedy_without_cache(prompt, 15)

    params = SamplingParams(15)
    stepping = start(advance)
    start(*(lambda prompt=prompt: client(prompt) for prompt in PROMPTS))()
    closed.set()
    stepping()
    assert_all_returned(engine)


def test_two_consumers_of_a_stream_get_each_event_once():
    engine = small_engine(max_running=1)
    handle = engine.submit(PROMPTS[0], SamplingParams(60))
    taken, lock = [], threading.Lock()

    def consume():
        for event in handle.stream():
            with lock:
                taken.append(event)

    start(consume, consume)()
    assert sum(len(event.tokens) for event in taken) == 60
    assert sorted(token for event in taken for token in event.tokens) == sorted(handle.tokens)
    assert [event.finish_reason for event in taken].count("length") == 1


def test_an_abort_ends_a_stream_that_another_thread_waits_for():
    engine = small_engine(max_running=1)
    running = engine.submit(PROMPTS[0], SamplingParams(100), on_event=dawdle)
    waiting = engine.submit(PROMPTS[4], SamplingParams(5))
    events = []
    join = start(lambda: events.extend(waiting.stream()), lambda: events.extend(running.stream()))
    while not running.tokens:
        time.sleep(0.001)
    waiting.abort()
    running.abort()
    join()
    assert [event.finish_reason for event in events].count("abort") == 2
    assert waiting.tokens == ()
    assert list(running.tokens) == greedy_without_cache(PROMPTS[0], len(running.tokens))
    assert_all_returned(engine)


def test_closing_ends_streams_that_other_threads_wait_for():
    engine = small_engine()
    params = SamplingParams(90)
    handles = [engine.submit(prompt, params, on_event=dawdle) for prompt in PROMPTS[:4]]
    streamed: list[list[int]] = [[] for _ in handles]

    def read(handle, tokens):
        for event in handle.stream():
            tokens.extend(event.tokens)

    def consume(handle, tokens):
        with pytest.raises(RequestFailed, match="closed") as failed:
            read(handle, tokens)
        assert isinstance(failed.value.__cause__, EngineClosed)

    def advance():
        with pytest.raises(EngineClosed):
            engine.run()

    each = zip(handles, streamed, strict=True)
    join = start(advance, *(lambda each=each: consume(*each) for each in each))
    while not handles[0].tokens:
        time.sleep(0.001)
    engine.close()
    join()
    assert 0 < len(handles[0].tokens) < 90
    for handle, tokens in zip(handles, streamed, strict=True):
        assert tokens == list(handle.tokens) == greedy_without_cache(handle.prompt, len(tokens))
    assert_all_returned(engine)


def test_who_waits_for_the_lock_gets_it_before_who_takes_it_again_and_again():
    lock = FairLock()
    held, rounds = threading.Event(), 0
    entered: list[int] = []

    def keep_taking():
        nonlocal rounds

        def work():
            nonlocal rounds
            held.set()
            rounds += 1
            time.sleep(0.001)

        while not entered and rounds < 10_000:
            lock.run(work)

    def visit():
        held.wait(TIMEOUT)
        before = rounds
        lock.run(lambda: lock.run(lambda: entered.append(rounds - before)))

    start(keep_taking, visit)()
    assert entered[0] <= 5


def test_the_locks_owner_may_take_it_again_while_others_wait():
    lock = FairLock()
    order = []

    def work():
        join = start(lambda: lock.run(lambda: order.append("other")))
        time.sleep(0.01)
        lock.run(lambda: order.append("owner"))
        time.sleep(0.01)
        order.append("still the owner")
        return join

    lock.run(work)()
    assert order == ["owner", "still the owner", "other"]
