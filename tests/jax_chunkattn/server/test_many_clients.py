"""Hundreds of clients for minutes: no stream is lost or wrong, and nothing leaks."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractContextManager

import pytest

from jax_chunkattn import SamplingParams
from jax_chunkattn.server.limits import Limits
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine
from tests.jax_chunkattn.server.endpoints import Running, running, until
from tests.jax_chunkattn.server.many import Mix, break_off, read_streams

LENGTHS = [
    pytest.param(12, 0.0, id="short"),
    pytest.param(200, 10.0, id="slow", marks=pytest.mark.slow),
    pytest.param(200, 120.0, id="thorough", marks=[pytest.mark.slow, pytest.mark.thorough]),
]


def served(mix: Mix) -> AbstractContextManager[Running]:
    """An endpoint, and the right answers, of an engine that serves nobody else meanwhile."""
    engine = make_engine(tokenizer=BytePairs())
    params = [SamplingParams(count) for count in mix.max_tokens]
    mix.answers = [out.samples[0].tokens for out in engine.generate(mix.prompts, params)]
    engine.reset()
    return running(engine, limits=Limits(queue=2000, streams=2000))


@pytest.mark.parametrize(("clients", "seconds"), LENGTHS)
def test_every_stream_is_whole_and_right(clients: int, seconds: float):
    mix = Mix.of(60)
    with served(mix) as found:
        read = asyncio.run(read_streams(found, mix, clients, seconds))
        until(lambda: found.endpoint.gate.open == 0)
        assert read >= clients
        assert found.engine.stats.failed == found.engine.stats.aborted == 0
        assert_all_returned(found.engine)


@pytest.mark.parametrize(("clients", "seconds"), LENGTHS)
def test_clients_that_go_leave_no_chunk_and_no_task(clients: int, seconds: float):
    mix = Mix.of(60)
    with served(mix) as found:
        threads = threading.active_count()
        tasks_before = tasks_of(found)
        gone, whole = asyncio.run(break_off(found, mix, clients, seconds))
        assert gone > whole > 0
        until(lambda: found.endpoint.gate.open == 0)
        until(lambda: found.engine.stats.running == found.engine.stats.waiting == 0)
        until(lambda: len(tasks_of(found)) <= len(tasks_before))
        assert found.endpoint.gate.waiting == 0
        assert not found.get("/tree").value["requests"]
        assert threading.active_count() <= threads + 16  # those of the loop's own pool
        assert found.complete("abc", max_tokens=3).status == 200
        assert_all_returned(found.engine)


def tasks_of(found: Running) -> set[asyncio.Task]:
    """Of the server's event loop, but those of idle connections, which it has none of."""
    loop = found.endpoint.thread.loop
    return asyncio.run_coroutine_threadsafe(_tasks(), loop).result(60)


async def _tasks() -> set[asyncio.Task]:
    mine = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not mine}
