"""The work of `engine`: the same rows by the bare decode loop and by the engine, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.bare_loop import BareLoop, random_pool
from experiments.engine.config import DETERMINISTIC, ON_A_MESH, SIDES, EngineConfig
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.interrupts import deferred_interrupts
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, ModelSource, load_model
from jax_chunkattn import (
    CacheConfig,
    Engine,
    PrefixTree,
    SamplingParams,
    chunks_needed,
)
from jax_chunkattn.device.backend import choose_backend
from models import LoadedModel

Prompts = Sequence[Sequence[int]]
SETTING = (
    "model",
    "rows",
    "shared_tokens",
    "own_tokens",
    "tokens",
    "steps_per_call",
    "dtype",
    "rounds",
)


_FIELDS = ("tokens", "seconds", "host_seconds")


@dataclasses.dataclass(frozen=True)
class Timed:
    """Tokens decoded in a time, and the host's share of it that the device did not hide."""

    tokens: int
    seconds: float
    host_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def host_microseconds(self) -> float:
        """Of host work for each token."""
        return 1e6 * self.host_seconds / self.tokens


@compilation_cache()
def compare(config: EngineConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    environment = describe_environment()
    loaded = load_model(
        source,
        LoadOptions(config.dtype, config.seed, config.max_positions, chosen_heads(config)),
    )
    prompts = _prompts(config, loaded)
    folder.begin(environment)
    with deferred_interrupts() as check_interrupt:
        sides = _Sides(config, loaded, prompts, check_interrupt)
        units = {
            f"round {number}": lambda number=number: sides.round(number)
            for number in range(1, config.rounds + 1)
        }
        rounds = measure_units(folder, units, "engine")
    timed = {
        name: [Timed(**{key: one[name][key] for key in _FIELDS}) for one in rounds]
        for name in rounds[0].keys() & SIDES
    }
    summary = {
        "experiment": "engine",
        **{name: getattr(config, name) for name in SETTING},
        **_measures(timed["bare loop"], timed["engine"]),
        **(_price(timed, DETERMINISTIC, "deterministic") if config.deterministic else {}),
        **(_price(timed, ON_A_MESH, "mesh") if config.mesh_of_one else {}),
        "environment": environment,
    }
    return finish(folder, summary)


class _Sides:
    """All sides, compiled when the first round is timed."""

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        prompts: Prompts,
        check_interrupt: Callable[[], None],
    ) -> None:
        self._given = (config, loaded, prompts)
        self._check_interrupt = check_interrupt
        self._sides: dict[str, Callable[[], Timed]] = {}

    def round(self, number: int) -> dict[str, Any]:
        """Each side once."""
        if not self._sides:
            self._sides = {  # the engine first: its program serves both
                "engine": engine_side(*self._given, self._check_interrupt),
                "bare loop": bare_loop(*self._given),
            }
            if self._given[0].deterministic:
                side = engine_side(*self._given, self._check_interrupt, deterministic=True)
                self._sides[DETERMINISTIC] = side
            if self._given[0].mesh_of_one:
                mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
                side = engine_side(*self._given, self._check_interrupt, mesh=mesh)
                self._sides[ON_A_MESH] = side
            engines = (side for name, side in self._sides.items() if name != "bare loop")
            for side in (*self._sides.values(), *engines):
                side()  # compiles; an engine's second time finds its prompts cached, as later ones
        record: dict[str, Any] = {"kind": "round", "round": number}
        for name, side in self._sides.items():
            one = side()
            record[name] = {**dataclasses.asdict(one), "rate": one.rate}
            self._check_interrupt()
        return record


def _measures(bare: Sequence[Timed], engine: Sequence[Timed]) -> dict[str, Any]:
    """Medians over the rounds; each ratio is of the two sides of one round."""
    ratios = _ratios(engine, bare)
    host = median(one.host_microseconds for one in engine)
    return {
        "bare_tokens_per_second": round(median(one.rate for one in bare), 2),
        "engine_tokens_per_second": round(median(one.rate for one in engine), 2),
        "ratio": round(median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "host_microseconds_per_token": round(host, 2),
    }


def _price(timed: Mapping[str, Sequence[Timed]], side: str, name: str) -> dict[str, Any]:
    """What it costs an engine to be deterministic, or on a mesh."""
    return {
        f"{name}_tokens_per_second": round(median(one.rate for one in timed[side]), 2),
        f"{name}_ratio": round(median(_ratios(timed[side], timed["engine"])), 4),
    }


def _ratios(mine: Sequence[Timed], base: Sequence[Timed]) -> list[float]:
    """Of rates, in each round."""
    return [one.rate / other.rate for one, other in zip(mine, base, strict=True)]


def bare_loop(config: EngineConfig, loaded: LoadedModel, prompts: Prompts) -> Callable[[], Timed]:
    """Decodes the rows from where their prompts end, by the engine's own program."""
    tokens = config.tokens // config.steps_per_call * config.steps_per_call
    cache = _cache(config, prompts)
    spec = loaded.model.cache_spec
    tree = PrefixTree(cache.chunks_for(spec), config.chunk_size)
    for prompt in prompts:
        sequence = tree.insert(prompt)
        tree.reserve(sequence, config.tokens)
    rows = tree.rows()
    columns = -(-loaded.config.max_positions // config.chunk_size)
    loop = BareLoop(
        loaded,
        random_pool(spec, tree.num_chunks, config.chunk_size, config.dtype, config.seed),
        [row.chunk_table for row in rows],
        [row.num_tokens for row in rows],
        tokens=tokens,
        steps_per_call=config.steps_per_call,
        backend=choose_backend(spec, cache),
        columns=min(columns, tree.num_chunks),
    )

    def run() -> Timed:
        (seconds,) = loop.run().seconds
        return Timed(tokens * len(rows), seconds)

    return run


def engine_side(
    config: EngineConfig,
    loaded: LoadedModel,
    prompts: Prompts,
    check_interrupt: Callable[[], None],
    *,
    deterministic: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[], Timed]:
    """Answers the prompts by one engine, which keeps them cached from one time to the next; timed
    while all rows decode: after the last has begun and before the first has ended."""
    engine = Engine(
        loaded.model,
        _cache(config, prompts),
        max_running=config.rows,
        steps_per_call=config.steps_per_call,
        deterministic=deterministic,
        mesh=mesh,
    )
    params = SamplingParams(config.tokens + 1, ignore_eos=True)

    def run() -> Timed:
        handles = [engine.submit(prompt, params) for prompt in prompts]
        marks = []
        while not any(handle.done for handle in handles):
            engine.step()
            check_interrupt()
            if all(handle.tokens for handle in handles):
                tokens = sum(len(handle.tokens) for handle in handles)
                marks.append((time.perf_counter(), tokens, engine.stats.host_seconds))
        engine.run()
        (began, before, host_before), *_, (ended, after, host_after) = marks
        return Timed(after - before, ended - began, host_after - host_before)

    return run


def _cache(config: EngineConfig, prompts: Prompts) -> CacheConfig:
    num_chunks = chunks_needed(prompts, config.tokens + 1, chunk_size=config.chunk_size)
    return CacheConfig(num_chunks, config.chunk_size, config.dtype)


def _prompts(config: EngineConfig, loaded: LoadedModel) -> Prompts:
    longest = config.shared_tokens + config.own_tokens + config.tokens + 1
    if longest > loaded.config.max_positions:
        raise UserError(
            f"--shared-tokens, --own-tokens and --tokens make {longest} positions, "
            f"{config.model} has {loaded.config.max_positions}"
        )
    random = np.random.default_rng(config.seed)
    ids = random.integers(0, loaded.config.vocab_size, config.shared_tokens).tolist()
    own = random.integers(0, loaded.config.vocab_size, (config.rows, config.own_tokens))
    return [ids + each for each in own.tolist()]
