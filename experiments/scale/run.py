"""The work of `scale`: one engine, fleets, and actors that are killed."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from experiments.harness.environment import describe_environment
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.scale.config import ScaleConfig
from jax_chunkattn import (
    CacheConfig,
    Engine,
    KVEvents,
    Router,
    SamplingParams,
    use_compilation_cache,
)
from jax_chunkattn.replicas.answer import Answer
from jax_chunkattn.replicas.front_end import FrontEnd
from jax_chunkattn.replicas.on_ray import import_ray, serve_on_ray
from jax_chunkattn.replicas.policies import POLICIES

Tokens = tuple[int, ...]


def measure(config: ScaleConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    requests = _Requests(config)
    folder.begin(environment, ray=import_ray().__version__)
    with _ray(max(config.replicas)):
        expected: list[Tokens] = []

        def answers() -> list[Tokens]:
            """One engine's, computed when they are first needed."""
            expected.extend([] if expected else _one_engine(config, source, requests))
            return expected

        units = {
            f"{policy}, {replicas} replicas": functools.partial(
                _round, config, source, requests, answers, policy, replicas
            )
            for replicas in config.replicas
            for policy in config.policies
        }
        if config.kills:
            units["kills"] = functools.partial(_kills, config, source, requests, answers)
        records = measure_units(folder, units, "rounds")
    rounds = [one for one in records if one["kind"] == "round"]
    kills = [kill for one in records if one["kind"] == "kills" for kill in one["kills"]]
    summary = {
        "experiment": "scale",
        **{name: getattr(config, name) for name in ("model", "requests", "tokens", "seed")},
        "rounds": rounds,
        "kills": kills,
        "different": sum(one["different"] for one in records),
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Requests:
    """Prompts, in the order they are sent, and how each is answered."""

    def __init__(self, config: ScaleConfig):
        random = np.random.default_rng(config.seed)

        def tokens(count: int) -> list[int]:
            return random.integers(0, 200, count).tolist()  # every vocabulary has so many

        families = [tokens(config.shared_tokens) for _ in range(config.families)]
        chosen = random.integers(0, config.families, config.requests).tolist()
        self.prompts = [families[family] + tokens(config.own_tokens) for family in chosen]
        self.params = [
            SamplingParams(config.tokens, temperature=float(number % 2), seed=number)
            for number in range(config.requests)
        ]


def make_engine(config: ScaleConfig, source: ModelSource, events: KVEvents) -> Engine:
    """The engine of a replica, and the one that all are compared with."""
    use_compilation_cache()
    loaded = load_model(source, LoadOptions("float32", config.seed))
    chunks = config.pool_tokens // config.chunk_size
    cache = CacheConfig(num_chunks=chunks, chunk_size=config.chunk_size)
    return Engine(loaded.model, cache, max_running=config.at_once, kv_events=events)


@contextmanager
def _ray(processors: int) -> Iterator[None]:
    """Ray on this machine, with room for so many actors; they import what this process does."""
    ray = import_ray()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it forks where JAX has threads, and runs a program there
        ray.init(
            num_cpus=processors,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={
                "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
            },
        )
    try:
        yield
    finally:
        ray.shutdown()


def _one_engine(config: ScaleConfig, source: ModelSource, requests: _Requests) -> list[Tokens]:
    engine = make_engine(config, source, KVEvents())
    outputs = engine.generate(requests.prompts, requests.params)
    return [output.samples[0].tokens for output in outputs]


def _front_end(config: ScaleConfig, source: ModelSource, policy: str, replicas: int) -> FrontEnd:
    router = Router(POLICIES[policy](), chunk_size=config.chunk_size, seed=config.seed)
    make = functools.partial(make_engine, config, source)
    return serve_on_ray(make, replicas, router=router, num_cpus=1)


def _round(
    config: ScaleConfig,
    source: ModelSource,
    requests: _Requests,
    expected: Any,
    policy: str,
    replicas: int,
) -> Record:
    """All requests, so many at once, by a fleet that has compiled but holds nothing of them."""
    wanted, began = expected(), time.perf_counter()
    with _front_end(config, source, policy, replicas) as front:
        _warm(front, replicas, config)
        started = time.perf_counter() - began
        before, sent, routing = front.found, time.perf_counter(), []

        def serve(number: int) -> Tokens:
            begin = time.perf_counter()
            answer = front.submit(requests.prompts[number], requests.params[number])
            routing.append(time.perf_counter() - begin)
            return answer.result().tokens

        with ThreadPoolExecutor(config.at_once) as pool:
            answers = list(pool.map(serve, range(config.requests)))
        seconds = time.perf_counter() - sent
        found, prompted = (now - then for now, then in zip(front.found, before, strict=True))
        stats = front.router.stats
    return {
        "kind": "round",
        "policy": policy,
        "replicas": replicas,
        "start_seconds": round(started, 2),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(config.requests * config.tokens / seconds, 1),
        "hit_rate": round(found / prompted, 4),
        "submit_microseconds": round(1e6 * float(np.median(routing)), 1),
        "by_replica": sorted(stats.by_replica.values()),
        "different": _different(answers, wanted),
    }


def _warm(front: FrontEnd, replicas: int, config: ScaleConfig) -> None:
    """Has every replica serve a burst of requests like those to come, so that it compiles."""
    while len(front.replicas) < replicas:
        time.sleep(0.05)
    rest = [token % 200 for token in range(config.shared_tokens + config.own_tokens - 1)]
    prompts = [[one % 200, *rest] for one in range(replicas * max(config.at_once, 2))]
    for answer in [front.submit(one, SamplingParams(config.tokens)) for one in prompts]:
        answer.result()


def _kills(config: ScaleConfig, source: ModelSource, requests: _Requests, expected: Any) -> Record:
    """Rounds in each of which an actor is killed when half of the first tokens are there."""
    wanted, different, kills = expected(), 0, []
    with _front_end(config, source, "longest-match", max(config.replicas)) as front:
        _warm(front, max(config.replicas), config)
        for _ in range(config.kills):
            at_once = range(min(config.at_once, config.requests))
            answers = [front.submit(requests.prompts[n], requests.params[n]) for n in at_once]
            reading = [_Reading(answer) for answer in answers]
            while sum(bool(one.tokens) for one in reading) < len(reading) / 2:
                time.sleep(0.001)
            lost = max(front.router.loads.items(), key=lambda item: item[1])[0]
            front.lose(lost)
            for one in reading:
                one.join()
            different += _different([tuple(one.tokens) for one in reading], wanted)
            moved = [one for one in reading if one.answer.moves]
            kills.append(
                {
                    "moved": len(moved),
                    "tokens_before": sum(one.before_pause for one in moved),
                    "pause": round(max((one.pause for one in moved), default=0.0), 3),
                }
            )
        lost = front.router.stats.lost
    return {"kind": "kills", "kills": kills, "lost": lost, "different": different}


class _Reading(threading.Thread):
    """Reads a stream, as a user would.

    Attributes:
      tokens: so far.
      pause: the longest time between two events, and `before_pause` the tokens there were then.
    """

    def __init__(self, answer: Answer):
        super().__init__(daemon=True)
        self.answer = answer
        self.tokens: list[int] = []
        self.pause, self.before_pause = 0.0, 0
        self.start()

    def run(self) -> None:
        last = None
        for event in self.answer.stream():
            now = time.perf_counter()
            if last is not None and now - last > self.pause:
                self.pause, self.before_pause = now - last, len(self.tokens)
            last = now
            self.tokens.extend(event.tokens)


def _different(answers: list[Tokens], expected: list[Tokens]) -> int:
    return sum(one != other for one, other in zip(answers, expected, strict=False))
