"""The options of `score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.harness.options import (
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)

WAYS = {
    "cold": "the prefix computed once, nothing cached",
    "cached": "the prefix found in the cache",
    "one of them unshared": "the prefix computed for one continuation alone",
    "alone": "the same tokens behind a single one",
}


@dataclass(frozen=True)
class ScoreConfig:
    """Score continuations of one prefix: with the prefix computed, found in the cache, computed
    for each of them, and without any."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "prefix": 80,
        "continuations": 3,
        "tokens": 12,
        "repeats": 1,
    }

    model: ModelName = "smollm2"

    prefix: int = 2000
    """Tokens of the prefix."""

    continuations: int = 10
    """How many continuations it has."""

    tokens: int = 32
    """Tokens of each of them."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    repeats: int = 3
    """Rounds; in each, everything is timed once."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of the tokens, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/score-TIME")] = None
    """Folder for the results."""


def check(config: ScoreConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    sizes = ("prefix", "continuations", "tokens", "chunk_size", "repeats", "max_positions")
    check_at_least_one(config, *sizes)
    check_seed(config.seed)
