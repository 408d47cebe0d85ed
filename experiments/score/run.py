"""The work of `score`: the same continuations scored in four ways, one after another."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import numpy as np

from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.score.config import WAYS, ScoreConfig
from jax_chunkattn import CacheConfig, Engine, Score, chunks_needed


@compilation_cache()
def measure(config: ScoreConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    loaded = load_model(source, LoadOptions("float32", config.seed, config.max_positions))
    if config.prefix + config.tokens > loaded.config.max_positions:
        raise UserError(
            f"--prefix {config.prefix} and --tokens {config.tokens} are more than the model's "
            f"{loaded.config.max_positions:,} positions"
        )
    folder.begin(environment)
    rounds = _Rounds(config, loaded.model)
    units = {
        f"round {number}": functools.partial(rounds.run, number) for number in range(config.repeats)
    }
    records = measure_units(folder, units, "rounds")
    ways = {name: _summary([record["ways"][name] for record in records]) for name in WAYS}
    summary = {
        "experiment": "score",
        **{name: getattr(config, name) for name in ("model", "prefix", "continuations", "tokens")},
        "chunk_size": config.chunk_size,
        "repeats": config.repeats,
        "ways": ways,
        "cached_over_alone": round(
            statistics.median(
                record["ways"]["cached"]["seconds"] / record["ways"]["alone"]["seconds"]
                for record in records
            ),
            3,
        ),
        "largest_difference": max(record["largest_difference"] for record in records),
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Rounds:
    """One engine, made when it is first needed, with every program compiled."""

    def __init__(self, config: ScoreConfig, model: Any) -> None:
        self._config = config
        self._model = model
        random = np.random.default_rng(config.seed)
        self._prefix = random.integers(0, model.vocab_size, config.prefix).tolist()
        shape = config.continuations, config.tokens
        self._continuations = random.integers(0, model.vocab_size, shape).tolist()

    @functools.cached_property
    def _engine(self) -> Engine:
        config = self._config
        texts = [[*self._prefix, *own] for own in self._continuations]
        chunks = chunks_needed(texts, 1, chunk_size=config.chunk_size)
        room = 3 * chunks + 2 * config.continuations  # for what is cached in other ways too
        engine = Engine(self._model, CacheConfig(room, config.chunk_size))
        engine.warm_up(scores=True)
        return engine

    def run(self, number: int) -> dict[str, Any]:
        """Each way once."""
        engine, others = self._engine, self._continuations
        engine.reset()
        queries = {
            "cold": (self._prefix, others, "shared"),
            "cached": (self._prefix, others, "shared"),
            "one of them unshared": (self._prefix, others[:1], "unshared"),
            "alone": (self._prefix[-1:], others, "alone"),
        }
        ways, scores = {}, {}
        for name, (prefix, continuations, salt) in queries.items():
            before, begin = engine.stats, time.perf_counter()
            scores[name] = engine.score(prefix, continuations, salt=salt)
            seconds, after = time.perf_counter() - begin, engine.stats
            if after.compilations > before.compilations:
                raise RuntimeError("a program was compiled while it was timed")
            ways[name] = {
                "seconds": round(seconds, 6),
                "computed": after.prefill_tokens - before.prefill_tokens,
            }
        return {
            "kind": "round",
            "number": number,
            "ways": ways,
            "totals": [round(score.total, 5) for score in scores["cached"]],
            "largest_difference": _largest_difference(scores["cold"], scores["cached"]),
        }


def _largest_difference(first: list[Score], second: list[Score]) -> float:
    """Between log-probabilities of the same tokens."""
    one, other = (
        np.array([token.chosen for score in scores for token in score.logprobs])
        for scores in (first, second)
    )
    return float(f"{np.abs(one - other).max():.2g}")


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": round(statistics.median(one["seconds"] for one in found), 4),
        "computed": found[0]["computed"],
    }
