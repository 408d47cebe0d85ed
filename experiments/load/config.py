"""The options of `load`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from experiments.harness.errors import UserError
from experiments.harness.options import (
    MaxPositions,
    ModelName,
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)


@dataclass(frozen=True)
class LoadConfig:
    """Ask an endpoint as many clients do, ours or another, and measure how it answers."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "vocabulary": 256,
        "sessions": 4,
        "turns": 2,
        "at_once": 2,
        "shared_tokens": 64,
        "own_tokens": 8,
        "completion_tokens": 8,
        "rounds": 1,
    }

    url: Annotated[str | None, by_default("URL", "an endpoint of our own")] = None
    """The endpoint, such as http://localhost:8000/v1."""

    key: Annotated[Path | None, by_default("FILE", "none")] = None
    """A file with the API key."""

    name: Annotated[str | None, by_default("STR", "the first that it names")] = None
    """What the endpoint calls the model."""

    vocabulary: int = 256
    """Prompts are made of token ids from 0 up to here."""

    model: ModelName = "random:tiny"

    sessions: int = 64
    """How many conversations there are."""

    turns: int = 1
    """Requests of each, every one behind all that was said before."""

    at_once: int = 32
    """Conversations under way at once; the next begins when one is over."""

    rate: Annotated[float | None, by_default("FLOAT", "not in time")] = None
    """Conversations that begin in a second, with random gaps (Poisson), however many are under
    way."""

    system_prompts: int = 1
    """How many system prompts there are; conversations take turns."""

    shared_tokens: int = 256
    """Tokens of a system prompt."""

    own_tokens: int = 32
    """Tokens that each turn adds."""

    completion_tokens: int = 64
    """Tokens of each answer."""

    rounds: int = 3
    """How often to do all this, with conversations of other words, after once to warm up."""

    compare: bool = True
    """With an endpoint of our own, also give the engine the same requests without one."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache, of an endpoint of our own."""

    steps_per_call: int = 8
    """Tokens decoded in one call, of an endpoint of our own."""

    pool_memory: str = "512MiB"
    """Size of the KV pool, of an endpoint of our own."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of prompts, gaps and random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/load-TIME")] = None
    """Folder for the results."""


def check(config: LoadConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(
        config,
        "vocabulary",
        "sessions",
        "turns",
        "at_once",
        "system_prompts",
        "shared_tokens",
        "own_tokens",
        "completion_tokens",
        "rounds",
        "chunk_size",
        "steps_per_call",
        "max_positions",
    )
    check_above_zero(config, "rate")
    check_seed(config.seed)
    if config.url is None:
        return
    try:
        parts = urlsplit(config.url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        known = False
    if not known:
        raise UserError(f"--url must be such as http://localhost:8000/v1, got {config.url}")
