"""The work of `load`: rounds of conversations with an endpoint, and with the engine alone."""

from __future__ import annotations

import asyncio
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from experiments.endpoint.config import EndpointConfig
from experiments.endpoint.run import make_engine
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import CheckFailed, UserError
from experiments.harness.percentiles import percentiles
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.load.asking import Asked, ask_endpoint, ask_engine
from experiments.load.client import Client
from experiments.load.config import LoadConfig
from experiments.load.workload import sessions_of
from experiments.loading import LoadOptions, load_model, parse_model

ENDPOINT, ENGINE = "endpoint", "engine"
WARM_UP = "warm-up"
ENDING_SECONDS = 120.0  # that an endpoint of our own has; its answers end after 30

Ask = Callable[[int], Asked]


@compilation_cache()
def measure(config: LoadConfig, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    compares = config.compare and config.url is None and config.rate is None
    folder.begin(environment)
    with _endpoint(config) as url:
        sides = {ENDPOINT: _of_endpoint(config, url)}
        if compares:
            sides[ENGINE] = _of_engine(config)
        units = {
            f"{side} {WARM_UP if number == 0 else number}": functools.partial(
                _record, side, number, ask
            )
            for number in range(config.rounds + 1)
            for side, ask in sides.items()
        }
        records = measure_units(folder, units, "rounds")
    found = {side: _summary([r for r in records if r["side"] == side]) for side in sides}
    errors = [error for record in records for error in record["errors"]]
    overhead = None
    if compares:
        pairs = zip(*(_speeds(records, side) for side in (ENDPOINT, ENGINE)), strict=True)
        overhead = round(statistics.median(1 - ours / engine for ours, engine in pairs), 4)
    summary = {
        "experiment": "load",
        **{name: getattr(config, name) for name in _SHOWN},
        "sides": found,
        "overhead": overhead,
        "errors": len(errors),
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    finish(folder, summary)
    if errors:
        raise CheckFailed(f"{len(errors)} requests had no answer, such as: {errors[0]}", summary)
    return summary


_SHOWN = (
    "url", "model", "sessions", "turns", "at_once", "rate", "system_prompts", "shared_tokens",
    "own_tokens", "completion_tokens", "rounds",
)  # fmt: skip


@contextmanager
def _endpoint(config: LoadConfig) -> Iterator[str]:
    """The URL of the endpoint; one of our own ends with the block."""
    if config.url is not None:
        yield config.url
        return
    options = {
        "--model": config.model,
        "--name": "model",
        "--port": 0,
        "--pool-memory": config.pool_memory,
        "--chunk-size": config.chunk_size,
        "--steps-per-call": config.steps_per_call,
        "--max-running": config.at_once,
        "--queue": config.sessions,
        "--streams": config.sessions,
        "--max-positions": config.max_positions,
        "--seed": config.seed,
    }
    given = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    command = [sys.executable, "-m", "experiments", "endpoint", *given, "--no-warm-up"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline().split(" is served at ")
        if len(said) != 2:
            raise UserError(f"the endpoint did not start: {' '.join(command[1:])} says why")
        yield said[1].split(";")[0]
    finally:
        _end(process)


def _end(process: subprocess.Popen[str], seconds: float = ENDING_SECONDS) -> None:
    """Tells it to stop, and kills it where it does not."""
    process.terminate()
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        print(f"the endpoint had not ended after {seconds:g} s, and was killed", file=sys.stderr)


def _of_endpoint(config: LoadConfig, url: str) -> Ask:
    key = None
    if config.key is not None:
        try:
            key = config.key.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--key {config.key} cannot be read ({error})") from error

    async def ask(number: int) -> Asked:
        client = Client(url, key)
        try:
            names = [config.name] if config.name is not None else await client.models()
            if not names:
                raise UserError(f"--url {url} serves no model")
            return await ask_endpoint(
                client,
                names[0],
                sessions_of(config, number),
                max_tokens=config.completion_tokens,
                at_once=config.at_once if config.rate is None else None,
            )
        finally:
            await client.close()

    return lambda number: asyncio.run(ask(number))


def _of_engine(config: LoadConfig) -> Ask:
    @functools.cache
    def engine() -> Any:
        options = LoadOptions("float32", config.seed, config.max_positions)
        loaded = load_model(parse_model(config.model), options)
        same = EndpointConfig(
            pool_memory=config.pool_memory,
            chunk_size=config.chunk_size,
            steps_per_call=config.steps_per_call,
            max_running=config.at_once,
        )
        return make_engine(same, loaded, loaded.tokenizer)

    return lambda number: ask_engine(
        engine(),
        sessions_of(config, number),
        max_tokens=config.completion_tokens,
        at_once=config.at_once,
    )


def _record(side: str, number: int, ask: Ask) -> Record:
    """What came of a round; percentiles are over its requests."""
    asked = ask(number)
    answers = [one for one in asked.answers if one.first is not None and one.last is not None]
    tokens = sum(len(one.tokens) for one in asked.answers)
    prompt = sum(one.prompt_tokens or 0 for one in answers)
    known = [one for one in answers if one.cached_tokens is not None]
    return {
        "kind": "round",
        "side": side,
        "number": number,
        "requests": len(asked.answers),
        "errors": list(asked.errors[:10]),
        "seconds": round(asked.seconds, 6),
        "tokens": tokens,
        "prompt_tokens": prompt,
        "cached_tokens": sum(one.cached_tokens or 0 for one in known) if known else None,
        "first_token": percentiles((one.first or 0) - one.began for one in answers),
        "per_token": percentiles(
            ((one.last or 0) - (one.first or 0)) / (len(one.tokens) - 1)
            for one in answers
            if len(one.tokens) > 1
        ),
    }


def _speeds(records: Sequence[Record], side: str) -> list[float]:
    """Tokens a second of each round but the first, which is to warm up."""
    return [
        one["tokens"] / one["seconds"] for one in records if one["side"] == side and one["number"]
    ]


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """Medians over rounds."""
    measured = [one for one in records if one["number"]]
    side = measured[0]["side"]
    prompt = sum(one["prompt_tokens"] for one in measured)
    cached = [one["cached_tokens"] for one in measured]
    return {
        "requests": sum(one["requests"] for one in measured),
        "tokens_per_second": round(statistics.median(_speeds(measured, side)), 2),
        "cached": None if None in cached or not prompt else round(sum(cached) / prompt, 4),
        **{
            name: _medians([one[name] for one in measured]) for name in ("first_token", "per_token")
        },
    }


def _medians(found: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    known = [one for one in found if one is not None]
    if not known:
        return None
    return {name: round(statistics.median(one[name] for one in known), 6) for name in known[0]}
