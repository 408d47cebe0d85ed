"""Requests behind a front end: served by any replica, whatever becomes of it."""

from __future__ import annotations

import threading
import time

import pytest

from jax_chunkattn import (
    EngineClosed,
    InvalidRequest,
    RequestFailed,
    Router,
    SamplingParams,
)
from jax_chunkattn.device import device
from jax_chunkattn.replicas.front_end import FrontEnd
from tests.jax_chunkattn.engine.engines import make_engine, run
from tests.jax_chunkattn.replicas.links import CHUNK, LocalLink, every
from tests.jax_chunkattn.toy import token_tree

PROMPTS = token_tree((3, 40), (4, 9))
TOKENS = 40


def params_of(number: int) -> SamplingParams:
    """Some greedy, some drawn, some with penalties."""
    drawn, penalty = number % 3 > 0, 1.3 if number % 3 == 2 else 1.0
    return SamplingParams(TOKENS, seed=number, temperature=float(drawn), repetition_penalty=penalty)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What one engine answers."""
    engine = make_engine()
    return run([engine.submit(prompt, params_of(n)) for n, prompt in enumerate(PROMPTS)])


def front_end(dies=lambda: False, replicas: int = 2, **options) -> FrontEnd:
    router = Router(chunk_size=CHUNK)
    return FrontEnd(router, lambda name: LocalLink(dies), replicas, **options)


def test_many_replicas_answer_as_one_engine(expected):
    with front_end(replicas=3) as front:
        answers = [front.submit(prompt, params_of(n)) for n, prompt in enumerate(PROMPTS)]
        assert [list(answer.result().tokens) for answer in answers] == expected
        again = front.submit(PROMPTS[0], params_of(0)).result()
        assert list(again.tokens) == expected[0]
        found, prompted = front.found
        assert prompted == sum(map(len, PROMPTS)) + len(PROMPTS[0])
        assert found >= len(PROMPTS[0]) // CHUNK * CHUNK
        stats = front.router.stats
        assert stats.requests == len(PROMPTS) + 1
        assert stats.stored > 0
        assert set(front.router.loads.values()) == {0.0}


def test_replicas_that_are_lost_again_and_again_change_no_stream(expected):
    """Twenty times in the middle of streams: the tokens of an exchange are lost with it."""
    dies = every(7, most=20)
    with front_end(dies, replicas=2) as front:
        answers, streams = [], [[] for _ in PROMPTS]
        for round_ in range(4):
            for number, prompt in enumerate(PROMPTS):
                answer = front.submit(prompt, params_of(number))
                answers.append((number, answer))
            for number, answer in answers[round_ * len(PROMPTS) :]:
                streams[number] = [token for event in answer.stream() for token in event.tokens]
                assert streams[number] == expected[number]
                assert list(answer.result().tokens) == expected[number]
            if front.router.stats.lost >= 20:
                break
        assert front.router.stats.lost >= 10
        assert sum(answer.moves for _, answer in answers) == front.router.stats.rerouted > 20
        assert set(front.router.loads.values()) == {0.0}


def test_a_replica_that_is_ended_is_replaced_by_another(expected):
    with front_end() as front:
        answer = front.submit(PROMPTS[0], params_of(0))
        first = next(iter(answer.stream())).tokens
        assert answer.tokens[: len(first)] == tuple(expected[0][: len(first)])
        before = set(front.replicas)
        for name in before:
            front.lose(name)
        assert list(answer.result().tokens) == expected[0]
        with pytest.raises(ValueError, match="no replica 'nobody'"):
            front.lose("nobody")


def test_an_abort_ends_a_request_wherever_it_is_and_others_go_on(expected):
    with front_end(replicas=1) as front:
        gone, stays = (front.submit(PROMPTS[n], params_of(n)) for n in (0, 1))
        next(iter(gone.stream()))
        gone.abort()
        gone.abort()
        assert [event.finish_reason for event in gone.stream()][-1] == "abort"
        assert gone.result().finish_reason == "abort"
        assert list(stays.result().tokens) == expected[1]
        unsent = front.submit(PROMPTS[2], params_of(2))
        unsent.abort()
        assert unsent.result().finish_reason == "abort"


def test_what_a_replica_cannot_serve_fails_alone(expected):
    with front_end(replicas=1) as front:
        wrong = front.submit([999_999])
        long = front.submit(PROMPTS[0], SamplingParams(3900))
        good = front.submit(PROMPTS[0], params_of(0))
        with pytest.raises(InvalidRequest, match="999999"):
            wrong.result()
        with pytest.raises(InvalidRequest, match="1024 positions"):
            list(long.stream())
        assert list(good.result().tokens) == expected[0]
        with pytest.raises(ValueError, match="n is 2"):
            front.submit(PROMPTS[0], SamplingParams(n=2))
        with pytest.raises(ValueError, match="empty"):
            front.submit([])


def test_a_request_that_errors_end_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken device")

    with front_end(replicas=1) as front:
        monkeypatch.setattr(device.Device, "decode", fail)
        with pytest.raises(RequestFailed, match="broken device"):
            front.submit(PROMPTS[0], params_of(0)).result()


def test_when_no_replica_is_left_nobody_waits_for_one():
    with front_end(lambda: True, replicas=1, most_lost=2) as front:
        with pytest.raises(RequestFailed, match="replica"):
            front.submit(PROMPTS[0], params_of(0)).result()
        with pytest.raises(RequestFailed, match="no replica is left"):
            front.submit(PROMPTS[0], params_of(0)).result()

    def broken(name):
        raise OSError("no such machine")

    front = FrontEnd(Router(chunk_size=CHUNK), broken, 1)
    with pytest.raises(RequestFailed, match="replica"):
        front.submit(PROMPTS[0]).result()
    front.close()
    with pytest.raises(ValueError, match="at least 1"):
        FrontEnd(Router(), broken, 0)


def test_closing_ends_those_who_wait():
    front = front_end()
    answer = front.submit(PROMPTS[0], SamplingParams(100))
    errors = []

    def wait():
        try:
            answer.result()
        except EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    front.close()
    front.close()
    thread.join(timeout=60)
    assert len(errors) == 1 or answer.result().finish_reason == "length"
    with pytest.raises(EngineClosed):
        front.submit(PROMPTS[0])
