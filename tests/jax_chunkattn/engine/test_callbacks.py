"""Callbacks may do what any caller may: everyone still gets each token once and in order."""

from __future__ import annotations

import contextlib
import functools

import pytest

from jax_chunkattn import EngineClosed, RequestFailed, SamplingParams
from jax_chunkattn.engine.recording import Recorder
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree


@functools.cache
def right() -> list[list[int]]:
    """What a model without a cache answers."""
    return [greedy_without_cache(prompt, 24) for prompt in PROMPTS]


class Interrupt(BaseException):
    """As KeyboardInterrupt, but that pytest does not end for it."""


PROMPTS = token_tree((1, 20), (3, 5))


def run_with(act, at: int = 2):
    """Three requests that run together; `act(engine, handles)` at an event of the first.

    Returns engine, handles, and the events of each in the order of all.
    """
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
    seen = []

    def listener(index):
        def on_event(event):
            seen.append((index, event))
            if index == 0 and sum(which == 0 for which, _ in seen) == at:
                act(engine, handles)

        return on_event

    params = SamplingParams(24)
    handles = [
        engine.submit(prompt, params, on_event=listener(index))
        for index, prompt in enumerate(PROMPTS)
    ]
    while engine.step():
        engine.check()
    return engine, handles, seen


def tokens_of(index, seen):
    return [token for which, event in seen if which == index for token in event.tokens]


ACTIONS = {
    "step": lambda engine, handles: engine.step(),
    "run": lambda engine, handles: engine.run(),
    "wait for another": lambda engine, handles: handles[2].result(),
    "stream itself": lambda engine, handles: list(handles[0].stream()),
    "fork": lambda engine, handles: handles[0].fork(),
    "fork another": lambda engine, handles: handles[1].fork(),
    "submit": lambda engine, handles: engine.submit(PROMPTS[0], SamplingParams(5)).result(),
    "reset": lambda engine, handles: engine.reset(),
}


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_callback_that_uses_the_engine_disturbs_nobody(action, at):
    engine, handles, seen = run_with(ACTIONS[action], at)
    for index, handle in enumerate(handles):
        assert tokens_of(index, seen) == list(handle.tokens) == right()[index]
        assert handle.finish_reason == "length"
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_callback_may_abort_anyone(victim):
    engine, handles, seen = run_with(lambda _, handles: handles[victim].abort())
    for index, handle in enumerate(handles):
        events = [event for which, event in seen if which == index]
        assert tokens_of(index, seen) == list(handle.tokens)
        assert events[-1].finish_reason == ("abort" if index == victim else "length")
        assert list(handle.tokens) == right()[index][: len(handle.tokens)]
    assert_all_returned(engine)


@pytest.mark.parametrize("error", [ZeroDivisionError, Interrupt])
@pytest.mark.parametrize("act", ["step", "check", "fork"])
def test_no_callback_comes_between_an_error_and_its_repair(monkeypatch, error, act):
    """Of a call whose results were taken over for one row and not for the next."""
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
    record, failed = Recorder.record, []

    def fail_once(core, request, *args, **kwargs):
        if request is handles[1]._request and len(request.tokens) > 6 and not failed:
            failed.append(len(seen))
            raise error
        record(core, request, *args, **kwargs)

    def on_event(event):
        seen.append(event)
        if failed:
            acts[act]()

    acts = {
        "step": lambda: engine.step(),
        "check": lambda: engine.check(),
        "fork": lambda: handles[0].fork(SamplingParams(30)),
    }

    seen = []
    monkeypatch.setattr(Recorder, "record", fail_once)
    params = SamplingParams(24)
    handles = [engine.submit(PROMPTS[0], params, on_event=on_event)]
    handles += [engine.submit(prompt, params) for prompt in PROMPTS[1:]]
    with contextlib.suppress(Interrupt):
        engine.run()
    engine.run()
    assert failed
    assert [list(handle.result().tokens) for handle in handles] == right()
    assert engine.stats.recoveries == 1
    assert_all_returned(engine)


def test_a_callback_that_was_interrupted_costs_no_other_its_events():
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
    told = [[], []]

    def interrupted(event):
        told[0].append(event)
        raise Interrupt

    for prompt, on_event in zip(PROMPTS, (interrupted, told[1].append), strict=False):
        engine.submit(prompt, SamplingParams(1), on_event=on_event)
    with pytest.raises(Interrupt):
        engine.run()
    assert engine.has_work
    engine.run()
    assert [[event.finish_reason for event in each] for each in told] == [["length"]] * 2
    assert_all_returned(engine)


def test_a_fork_that_a_callback_closes_the_engine_for_is_refused():
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
    armed = []
    handle = engine.submit(
        PROMPTS[0], SamplingParams(60), on_event=lambda _: engine.close() if armed else None
    )
    while len(handle.tokens) < 4:
        engine.step()
    armed.append(1)
    with pytest.raises(EngineClosed):
        handle.fork()
    assert_all_returned(engine)


def test_a_callback_may_close_the_engine():
    engine, handles, _ = run_with_close()
    for handle in handles:
        with pytest.raises(RequestFailed, match="closed"):
            handle.result()
    assert_all_returned(engine)


def run_with_close():
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
    seen = []

    def close(event):
        seen.append(event)
        engine.close()

    handles = [engine.submit(prompt, SamplingParams(24), on_event=close) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    return engine, handles, seen


def test_a_callback_that_raises_at_the_last_event_leaves_the_answer_but_is_not_hidden():
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)

    def fussy(event):
        if event.finish_reason:
            raise ZeroDivisionError("at the end")

    handle = engine.submit(PROMPTS[0], SamplingParams(24), on_event=fussy)
    engine.run()
    assert list(handle.tokens) == right()[0]
    assert handle.finish_reason == "length"
    with pytest.raises(RequestFailed, match="at the end"):
        handle.result()
    assert_all_returned(engine)
