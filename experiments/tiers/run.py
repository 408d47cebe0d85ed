"""The work of `tiers`: each prompt's first token, timed in every way, one after another."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from experiments.codecs import codec_for
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.tiers.config import WAYS, TiersConfig
from jax_chunkattn import CacheConfig, Engine, SamplingParams

ROOM = "64GiB"
"""For what is kept: more than there is."""


@compilation_cache()
def measure(config: TiersConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    loaded = load_model(source, LoadOptions("float32", config.seed, config.max_positions))
    longest = max(config.lengths) + config.tokens
    if longest > loaded.config.max_positions:
        raise UserError(
            f"--lengths {max(config.lengths)} and --tokens {config.tokens} are more than the "
            f"model's {loaded.config.max_positions:,} positions"
        )
    folder.begin(environment)
    with TemporaryDirectory(dir=config.disk or folder.path) as disk:
        rounds = _Rounds(config, loaded.model, Path(disk))
        units = {
            f"{length} tokens, round {number}": functools.partial(rounds.run, length, number)
            for number in range(config.repeats)
            for length in config.lengths
        }
        records = measure_units(folder, units, "rounds")
    summary = {
        "experiment": "tiers",
        "model": config.model,
        "codec": config.codec,
        "chunk_size": config.chunk_size,
        "tokens": config.tokens,
        "repeats": config.repeats,
        "lengths": [_of_length(length, records) for length in config.lengths],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _of_length(length: int, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [record for record in records if record["length"] == length]
    return {
        "length": length,
        "bytes": own[0]["bytes"],
        "seconds": {
            way: round(statistics.median(one["seconds"][way] for one in own), 5) for way in WAYS
        },
    }


class _Rounds:
    """Engines of one pool's size, with every program compiled before anything is timed."""

    def __init__(self, config: TiersConfig, model: Any, disk: Path) -> None:
        self._config = config
        self._model = model
        self._disk = disk
        longest = max(config.lengths) + config.tokens
        self._num_chunks = -(-longest // config.chunk_size) + 1

    def _make(self, **tiers: Any) -> Engine:
        config = self._config
        cache = CacheConfig(
            self._num_chunks,
            config.chunk_size,
            codec=codec_for(config.codec, self._model.cache_spec),
            load="always",
            **tiers,
        )
        engine = Engine(self._model, cache, max_running=1)
        engine.warm_up()
        return engine

    def run(self, length: int, number: int) -> dict[str, Any]:
        """Each way once, with a prompt of its own."""
        config = self._config
        random = np.random.default_rng((config.seed, length, number))
        size = length // config.chunk_size * config.chunk_size + config.tokens
        prompt = random.integers(0, self._model.vocab_size, size).tolist()
        first = functools.partial(_first_token, prompt=prompt)
        on_disk = {"disk": self._disk, "disk_memory": ROOM}
        seconds, tokens = {}, set()

        def note(way: str, engine: Engine, found: str) -> None:
            before = engine.stats.prompts
            seconds[way], token = first(engine)
            tokens.add(token)
            after = engine.stats.prompts
            there = getattr(after, found) - getattr(before, found)
            if there != size - config.tokens:
                raise RuntimeError(f"{there} of {size - config.tokens} tokens were {found}: {way}")

        with self._make() as engine:
            note("computed", engine, "new")
            note("pool", engine, "hit")
        with self._make(host_memory=ROOM, **on_disk) as engine:
            note("kept", engine, "new")
            engine.resize(num_chunks=self._num_chunks)  # which all chunks leave for memory
            engine.warm_up()
            note("memory", engine, "host")
            held = engine.stats.bytes_per_chunk
        for way in ("disk", "disk alone"):
            with self._make(**on_disk) as engine:
                if way == "disk alone":
                    _forget_files(self._disk)
                note(way, engine, "disk")
        with self._make(**on_disk) as engine:
            engine.reset()  # removes the files
        if len(tokens) != 1:
            raise RuntimeError(f"first tokens differ: {sorted(tokens)}")
        return {
            "kind": "round",
            "length": length,
            "number": number,
            "bytes": length // config.chunk_size * held,
            "seconds": {way: round(seconds[way], 6) for way in WAYS},
        }


def _first_token(engine: Engine, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds until it is there, and which it is."""
    compiled, began = engine.stats.compilations, time.perf_counter()
    [token] = engine.submit(prompt, SamplingParams(1)).result().tokens
    seconds = time.perf_counter() - began
    if engine.stats.compilations > compiled:
        raise RuntimeError("a program was compiled while it was timed")
    return seconds, token


def _forget_files(folder: Path) -> None:
    """Has the system keep none of these files in its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
