"""Running a batch through an engine."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from experiments.generate.decoding import BatchSettings, Measured, decode_batch
from experiments.harness.interrupts import deferred_interrupts, no_interrupt_lost
from experiments.sampling import MOST_TEMPERATURE, MOST_TOP_K
from jax_chunkattn import InvalidRequest, PoolExhausted, RequestFailed, SamplingParams

SETTINGS = BatchSettings(
    chunk_size=16,
    codec="identity",
    selector=None,
    clusters=None,
    dtype="float32",
    sharing=True,
    implementation=None,
    steps_per_call=8,
    stop_tokens=(),
)


def decode(**callbacks: Any) -> Measured:
    prompts = [(1, 2, 3), (1, 2, 4), (1, 2, 5)]
    sampling = [SamplingParams(max_tokens=8)] * 3
    names = [f"q.txt:{line}" for line in (1, 3, 4)]
    return decode_batch(None, prompts, sampling, SETTINGS, names=names, **callbacks)


def test_each_request_is_told_as_it_finishes(fake_engine: type) -> None:
    told = []
    decode(on_finished=lambda index, request: told.append((index, len(request.tokens))))
    assert told == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("kind", [InvalidRequest, PoolExhausted])
def test_a_prompt_that_the_engine_refuses_is_named(
    fake_engine: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    submit = fake_engine.submit

    def refuse(engine: Any, prompt: tuple[int, ...], params: SamplingParams, **_: Any) -> Any:
        if prompt == (1, 2, 4):
            raise kind("it never fits")
        return submit(engine, prompt, params)

    monkeypatch.setattr(fake_engine, "submit", refuse)
    with pytest.raises(kind, match=r"^prompt q.txt:3: it never fits$"):
        decode()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PoolExhausted("no room"), PoolExhausted, "no room"),
        (ZeroDivisionError("zero"), RequestFailed, "the request failed: zero"),
    ],
)
def test_a_request_that_an_error_ended_is_no_answer(
    fake_engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    step = fake_engine.step

    def fail(engine: Any) -> None:
        step(engine)
        engine.handles[2].finish_reason, engine.handles[2].error = "error", error

    monkeypatch.setattr(fake_engine, "step", fail)
    with pytest.raises(kind, match=rf"^prompt q.txt:4: {message}$"):
        decode()


def test_interrupted_requests_are_told_with_what_they_have(fake_engine: Any) -> None:
    fake_engine.interrupt_at = 3
    told = []
    with pytest.raises(KeyboardInterrupt):
        decode(
            on_finished=lambda index, request: told.append(
                (index, request.finish_reason, len(request.tokens))
            )
        )
    assert told == [(0, "stop", 1), (1, "stop", 2), (2, None, 2)]


def test_signal_waits_for_the_end_of_a_step(fake_engine: Any) -> None:
    told = []

    def on_progress(progress: Any) -> None:
        if progress.done == 8 + 8 + 2:  # after the second step two have finished
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        decode(
            on_progress=on_progress,
            on_finished=lambda index, request: told.append((index, request.finish_reason)),
        )
    assert told == [(0, "stop"), (1, "stop"), (2, None)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_deferred_interrupts_come_at_the_check_the_end_or_the_second_signal() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as check:  # noqa: PT012
        check()
        signal.raise_signal(signal.SIGINT)
        reached.append("after the signal")
        check()
        reached.append("after the check")
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second signal")
    assert reached == ["after the signal", "the end"]


def test_an_interrupt_in_a_finaliser_comes_once_more() -> None:
    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    reached = []
    with pytest.raises(KeyboardInterrupt), no_interrupt_lost():  # noqa: PT012
        one = Interrupted()
        del one
        time.sleep(10)
        reached.append("the end")
    assert reached == []


def test_measured_rates(fake_engine: type) -> None:
    measured = decode()
    assert measured.prompt_tokens == 9
    assert measured.prefill_tokens_computed == 4
    assert measured.prefill_tokens_per_second == pytest.approx(4 / 2.0)
    assert measured.prompt_tokens_per_second == pytest.approx(9 / 2.0)
    assert measured.decode_tokens == 6
    assert measured.decode_tokens_per_second == pytest.approx(6 / 3.0)
    assert measured.answers == ((1,), (1, 2), (1, 2, 3))
    assert measured.first_answer_seconds > 0


def test_progress_ends_at_its_total(fake_engine: type) -> None:
    seen = []
    decode(on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert (seen[-1].phase, seen[-1].done, seen[-1].total) == ("decode", 24, 24)


def test_the_engine_takes_all_that_the_command_lets_pass():
    params = SamplingParams(temperature=MOST_TEMPERATURE, top_k=MOST_TOP_K)
    assert params.top_k == MOST_TOP_K
    with pytest.raises(ValueError, match="temperature must be"):
        SamplingParams(temperature=1.01 * MOST_TEMPERATURE)
    with pytest.raises(ValueError, match="top_k must be"):
        SamplingParams(top_k=MOST_TOP_K + 1)
