"""Errors in the middle of things: nothing is lost, nothing leaks, and nobody waits for ever."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

import models
from jax_chunkattn import RequestFailed, SamplingParams
from jax_chunkattn.device import device, invocations
from jax_chunkattn.engine import (
    core,
    in_flight,
    lifecycle,
    prompts,
    recording,
    rows,
    scheduler,
)
from jax_chunkattn.tree.allocator import ChunkAllocator, PoolExhausted
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

PROMPTS = token_tree((1, 40), (4, 9))
TOKENS = 60  # of each answer: two rows at once outgrow a pool of ten chunks


@functools.cache
def right() -> list[list[int]]:
    """What a model without a cache answers."""
    return [greedy_without_cache(prompt, TOKENS) for prompt in PROMPTS]


class Fault(Exception):
    pass


def fail_once(monkeypatch, owner, name, at):
    """Makes call number `at` of a function raise; returns how often it was called."""
    calls = itertools.count()
    function = getattr(owner, name)
    counted = []

    def maybe(*args, **kwargs):
        counted.append(next(calls))
        if counted[-1] == at:
            raise Fault(f"{name} {at}")
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, maybe)
    return counted


def submit_all(engine):
    return [engine.submit(prompt, SamplingParams(TOKENS)) for prompt in PROMPTS]


BOOKS = (PrefixTree, scheduler.Scheduler)
# One change of each kind: of the host's books, of a prompt, a row, a call and what the device does.
EVERYDAY = {
    (PrefixTree, "insert"), (scheduler.Scheduler, "_place"), (core.Core, "_send_prefill"),
    (core.Core, "_collect"), (prompts.Prompts, "_admitted"), (lifecycle.Lifecycle, "prefilled"),
    (recording.Recorder, "record"), (rows.PlannedRows, "plan"), (device.Device, "copy_chunks"),
    (device.Device, "decode"), (device.Device, "fetch"),
}  # fmt: skip


def marks_of(owner, name) -> list[pytest.MarkDecorator]:
    if (owner, name) in EVERYDAY:
        return []
    return [pytest.mark.slow, *([pytest.mark.thorough] if owner in BOOKS else [])]


HOST_FUNCTIONS = [
    (owner, name)
    for owner, names in {
        PrefixTree: ("insert", "reserve", "append", "release", "mark_computed", "rows"),
        scheduler.Scheduler: (
            "admit_next", "enqueue", "reserve", "preempt_youngest", "finish", "_place", "_vacate",
            "_release",
        ),
        core.Core: (
            "_turn", "_reserve_rows", "_send_prefill", "_send_decode", "_collect", "_note_memory",
        ),
        prompts.Prompts: ("choose", "sent", "_admitted", "_add_segment"),
        lifecycle.Lifecycle: ("prefilled", "finish", "add"),
        recording.Recorder: ("record",),
        in_flight.CallsInFlight: ("add", "take_oldest"),
        rows.PlannedRows: ("plan",),
        rows: ("plan_decode",),
        device.Device: ("copy_chunks", "place", "prefill", "decode", "fetch", "_update"),
        invocations: ("pack_segments",),
        prompts: ("calls_of_round", "next_call"),
    }.items()
    for name in names
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "times"),
    [
        *(
            pytest.param(
                owner, name, (0, 2, 11), id=f"{owner.__name__}.{name}", marks=marks_of(owner, name)
            )
            for owner, name in HOST_FUNCTIONS
        ),
        *(
            pytest.param(
                owner,
                name,
                (1, 5),
                id=f"{owner.__name__}.{name}, other times",
                marks=[pytest.mark.slow, *marks_of(owner, name)],
            )
            for owner, name in HOST_FUNCTIONS
        ),
    ],
)
def test_an_error_in_any_function_of_a_step_costs_time_only(monkeypatch, owner, name, times):
    """The pool is small: eviction and preemption are part of it."""
    called = 0
    for at in times:
        engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
        handles = submit_all(engine)
        with monkeypatch.context() as patch:
            calls = fail_once(patch, owner, name, at)
            tokens = [[], [], [], []]
            for index, handle in enumerate(handles):
                for event in handle.stream():
                    tokens[index].extend(event.tokens)
            called += len(calls)
        assert tokens == right()
        assert engine.stats.recoveries == (1 if len(calls) > at else 0)
        assert_all_returned(engine)
    assert called, f"{name} was never called"


@pytest.mark.parametrize("at", [*range(12), 20, 30, 40])
def test_a_failing_allocation_is_survived_wherever_it_happens(monkeypatch, at):
    engine = make_engine(num_chunks=10, prefill_tokens=32, max_running=3)
    handles = submit_all(engine)
    calls = itertools.count()
    allocate = ChunkAllocator.allocate

    def maybe(self, count):
        if next(calls) == at:
            raise PoolExhausted("as injected")
        return allocate(self, count)

    monkeypatch.setattr(ChunkAllocator, "allocate", maybe)
    assert run(handles) == right()
    monkeypatch.undo()
    assert_all_returned(engine)


def test_a_lasting_error_fails_the_requests_it_hits_and_the_engine_lives_on(monkeypatch):
    engine = make_engine(max_running=2)
    handles = submit_all(engine)
    with monkeypatch.context() as patch:

        def broken(*_, **__):
            raise Fault("the device is on fire")

        patch.setattr(device.Device, "decode", broken)
        for handle in handles:
            with pytest.raises(RequestFailed, match="on fire") as failed:
                handle.result()
            assert isinstance(failed.value.__cause__, Fault)
            assert handle.finish_reason == "error"
    assert engine.stats.failed == 4
    assert not engine.has_work
    assert run(submit_all(engine)) == right()
    assert_all_returned(engine)


def test_a_pool_that_cannot_be_rebuilt_fails_everyone_at_once(monkeypatch):
    engine = make_engine()
    handles = submit_all(engine)
    engine.step()
    with monkeypatch.context() as patch:
        fail_once(patch, device.Device, "decode", 0)

        def out_of_memory(*_, **__):
            raise MemoryError("no room for a pool")

        patch.setattr(device.Device, "_allocate", out_of_memory)
        with pytest.raises(RequestFailed, match="could not be rebuilt"):
            engine.run()
        for handle in handles:
            with pytest.raises(RequestFailed, match="no room for a pool"):
                handle.result()
    assert not engine.has_work


def test_a_poisoned_request_fails_alone(monkeypatch):
    """An error that only its own tokens cause, where it enters the tree."""
    engine = make_engine()
    poison = token_tree((1, 30), seed=5)[0]
    insert = PrefixTree.insert

    def picky(self, tokens, *args, **kwargs):
        if tuple(tokens) == tuple(poison):
            raise Fault("cannot stomach this")
        return insert(self, tokens, *args, **kwargs)

    monkeypatch.setattr(PrefixTree, "insert", picky)
    good = submit_all(engine)
    bad = engine.submit(poison, SamplingParams(4))
    good += submit_all(engine)
    assert run(good) == right() * 2
    with pytest.raises(RequestFailed, match="cannot stomach"):
        bad.result()
    assert_all_returned(engine)


def overflowing_model():
    """The toy model, but for token 7, whose values in the first layer overflow float32."""
    model: Any = models.load("random:tiny").model
    model.embedding[...] = model.embedding[...].at[:, 0].set(0).at[7].set(0).at[7, 0].set(9)
    model.blocks.qkv[...] = model.blocks.qkv[...].at[0, 0, :, -1].set(1e38)
    return model


def test_numbers_that_overflow_reach_no_other_request():
    """In chunks that it leaves to others, of another salt too, and beside them."""
    small = {"num_chunks": 10, "prefill_tokens": 32, "max_running": 3, "model": overflowing_model()}
    params = SamplingParams(12, logprobs=0, logit_bias={7: -100})
    good = [[token for token in prompt if token != 7] for prompt in PROMPTS]

    def answers(engine, salt=""):
        results = [engine.submit(prompt, params, salt=salt).result() for prompt in good]
        return [(result.tokens, result.logprobs) for result in results]

    expected = answers(make_engine(**small))
    engine = make_engine(**small)
    for salt in ("a", "b"):
        engine.submit([7] * 100, SamplingParams(2), salt="bad" + salt)
        assert answers(engine, salt) == expected


def test_a_callback_that_raises_ends_its_own_request():
    def fussy(event):
        if event.finish_reason is None:
            raise Fault("not in this mood")

    engine = make_engine()
    bad = engine.submit(PROMPTS[0], SamplingParams(24), on_event=fussy)
    good = submit_all(engine)
    assert run(good) == right()
    assert isinstance(bad.error, Fault)
    assert bad.finish_reason == "error"
    with pytest.raises(RequestFailed, match="mood"):
        bad.result()
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


def test_a_tokenizer_that_raises_ends_its_own_request():
    class Picky(BytePairs):
        def decode(self, ids):
            if list(ids[:3]) == right()[0][:3]:
                raise Fault("unspeakable")
            return super().decode(ids)

    engine = make_engine(tokenizer=Picky())
    assert right()[0][:3] != right()[1][:3]
    bad, good, *_ = handles = submit_all(engine)
    assert run([good]) == [right()[1]]
    assert isinstance(bad.error, Fault)
    for handle in handles[2:]:
        handle.abort()
    assert_all_returned(engine)


def test_an_exception_in_a_streams_consumer_ends_that_request_alone():
    engine = make_engine()
    first, *others = submit_all(engine)

    def consume():
        for _ in first.stream():
            raise Fault("consumer")

    with pytest.raises(Fault):
        consume()
    assert first.finish_reason == "abort"
    assert run(others) == right()[1:]
    assert_all_returned(engine)


def test_ctrl_c_in_the_middle_of_a_step_loses_nothing(monkeypatch):
    engine = make_engine()
    handles = submit_all(engine)
    append = PrefixTree.append
    calls = itertools.count()

    def interrupted(self, *args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return append(self, *args)

    monkeypatch.setattr(PrefixTree, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.check()
    assert run(handles) == right()
    assert_all_returned(engine)


def test_ctrl_c_while_a_fork_waits_for_the_device_loses_nothing(monkeypatch):
    engine = make_engine()
    handles = submit_all(engine)
    while not handles[0].tokens:
        engine.step()
    with monkeypatch.context() as patch:

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(device.Device, "fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handles[0].fork()
    engine.check()
    assert engine.stats.submitted == 4
    assert run(handles) == right()
    assert_all_returned(engine)


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
def test_a_fork_whose_copy_fails_leaves_nothing_behind(monkeypatch, error):
    engine = make_engine()
    handles = submit_all(engine)
    while not handles[0].tokens:
        engine.step()
    with monkeypatch.context() as patch:

        def broken(*_):
            raise error

        patch.setattr(device.Device, "copy_chunks", broken)
        with pytest.raises(error):
            handles[0].fork()
    engine.check()
    assert engine.stats.submitted == 4
    assert run([*handles, handles[0].fork(SamplingParams(30))])[:4] == right()
    assert_all_returned(engine)


def test_recomputed_requests_keep_their_penalties_logprobs_and_text(monkeypatch):
    params = SamplingParams(
        24, temperature=0.8, seed=3, repetition_penalty=1.2, frequency_penalty=0.5, logprobs=2
    )
    whole = make_engine(tokenizer=BytePairs()).submit(PROMPTS[0], params).result()
    engine = make_engine(tokenizer=BytePairs())
    fail_once(monkeypatch, device.Device, "decode", 4)
    again = engine.submit(PROMPTS[0], params).result()
    assert engine.stats.recoveries == 1
    assert (again.tokens, again.text) == (whole.tokens, whole.text)
    np.testing.assert_allclose(
        [one.chosen for one in again.logprobs], [one.chosen for one in whole.logprobs], atol=1e-4
    )
