"""Replicas in actors of Ray, killed in the middle of streams."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import models
from jax_chunkattn import CacheConfig, Engine, KVEvents, Router, SamplingParams
from jax_chunkattn.replicas.front_end import FrontEnd
from jax_chunkattn.replicas.offline import OfflineJob, answer_on_ray
from jax_chunkattn.replicas.on_ray import import_ray, serve_on_ray

ROOT = Path(__file__).resolve().parents[3]
CHUNK, ROWS, TOKENS = 16, 8, 160
PROMPTS = [[family] * 64 + [own, family, own] for own in range(4) for family in (5, 9)]


def tiny_engine(events: KVEvents) -> Engine:
    model = models.load("random:tiny").model
    cache = CacheConfig(num_chunks=300, chunk_size=CHUNK)
    return Engine(model, cache, max_running=ROWS, prefill_tokens=128, kv_events=events)


def params_of(number: int) -> SamplingParams:
    return SamplingParams(TOKENS, temperature=float(number % 2), seed=number)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Any]:
    """Ray with two processors; what one process compiles the others find."""
    ray = pytest.importorskip("ray")
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it forks where JAX has threads, and runs a program there
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """What one engine answers."""
    engine = tiny_engine(KVEvents())
    handles = [engine.submit(prompt, params_of(n)) for n, prompt in enumerate(PROMPTS)]
    return [handle.result().tokens for handle in handles]


def serve(ray: Any) -> FrontEnd:
    # Of a test's module workers know nothing: the function travels as it is.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return serve_on_ray(tiny_engine, 2, router=Router(chunk_size=CHUNK), num_cpus=1)


def kill_in_the_middle_of_streams(front: FrontEnd, expected: list[tuple[int, ...]]) -> None:
    """All prompts at once; when each has begun, the replica of one that still runs is killed."""
    answers = [front.submit(prompt, params_of(n)) for n, prompt in enumerate(PROMPTS)]
    streams = [answer.stream() for answer in answers]
    tokens = [list(next(stream).tokens) for stream in streams]
    running = [name for name, load in front.router.loads.items() if load]
    assert running, "all had ended: nothing was killed in the middle"
    front.lose(running[0])
    for got, stream in zip(tokens, streams, strict=True):
        got.extend(token for event in stream for token in event.tokens)
    assert [tuple(got) for got in tokens] == expected
    assert [answer.result().tokens for answer in answers] == expected
    assert any(answer.moves for answer in answers)


@pytest.mark.slow
def test_actors_that_are_killed_change_no_stream(on_ray, expected):
    with serve(on_ray) as front:
        for _ in range(3):
            kill_in_the_middle_of_streams(front, expected)
        assert front.router.stats.lost == 3


@pytest.mark.slow
@pytest.mark.thorough
def test_twenty_actors_that_are_killed_change_no_stream(on_ray, expected):
    with serve(on_ray) as front:
        for _ in range(20):
            kill_in_the_middle_of_streams(front, expected)
        assert front.router.stats.lost == 20


def breaking_engine(flag: Path, events: KVEvents) -> Engine:
    """One that breaks at its ninth prompt, unless one has before."""
    engine, submitted = tiny_engine(events), []
    submit = engine.submit

    def break_once(*arguments: Any, **options: Any) -> Any:
        submitted.append(1)
        if len(submitted) == 9 and not flag.exists():
            flag.touch()
            raise OSError("the machine is gone")
        return submit(*arguments, **options)

    engine.submit = break_once
    return engine


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray Data itself
def test_a_file_is_answered_line_by_line_once_though_it_broke_off(on_ray, tmp_path: Path):
    on_ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    prompts = [[line % 5] * 40 + [line] for line in range(30)]
    path, flag = tmp_path / "prompts.jsonl", tmp_path / "broken"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    job = OfflineJob(path, tmp_path / "answers.jsonl", SamplingParams(5), block_lines=4)
    with pytest.raises(Exception, match="the machine is gone"):
        answer_on_ray(job, partial(breaking_engine, flag), 1, num_cpus=1)
    there = {part.name: part.stat().st_mtime_ns for part in job.parts.glob("block-*.jsonl")}
    assert there
    assert not job.answers.exists()
    missing = job.begin()
    assert len(missing) + len(there) == 8
    assert answer_on_ray(job, partial(breaking_engine, flag), 2, num_cpus=1) == 30
    answers = [json.loads(line) for line in job.answers.read_text().splitlines()]
    assert [one["line"] for one in answers] == list(range(30))
    engine = tiny_engine(KVEvents())
    handles = [engine.submit(prompt, SamplingParams(5)) for prompt in prompts]
    assert [tuple(one["tokens"]) for one in answers] == [one.result().tokens for one in handles]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"jax_chunkattn\[ray\]"):
        serve_on_ray(tiny_engine, 1)
    with pytest.raises(ImportError, match="extra `ray`"):
        import_ray()
