"""The options of `scale`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.cluster.config import PolicyName, check_policies
from experiments.harness.errors import UserError
from experiments.harness.options import ModelName, by_default, check_at_least_one, check_seed


@dataclass(frozen=True)
class ScaleConfig:
    """Serve requests by engines in actors of Ray, kill some in the middle of streams, and compare
    every answer with one engine's."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "replicas": (2,),
        "policies": ("longest-match",),
        "requests": 12,
        "families": 4,
        "kills": 1,
    }

    model: ModelName = "random:small"

    replicas: tuple[int, ...] = (1, 2)
    """Actors."""

    policies: tuple[PolicyName, ...] = ("random", "longest-match")
    """How one is chosen for a request."""

    kills: int = 5
    """Actors that are killed in the middle of streams, one after another, of the largest fleet."""

    requests: int = 96
    """Requests of a round."""

    at_once: int = 16
    """Requests that are out at a time."""

    families: int = 16
    """Prefixes that prompts begin with."""

    shared_tokens: int = 512
    """Tokens of such a prefix."""

    own_tokens: int = 32
    """Tokens of each prompt behind it."""

    tokens: int = 64
    """Tokens of an answer."""

    pool_tokens: int = 8_192
    """Tokens that each replica's pool holds."""

    chunk_size: int = 16
    """Tokens in a chunk."""

    seed: int = 0
    """Seed of weights, prompts and answers; every other one is drawn at temperature 1."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/scale-TIME")] = None
    """Folder for the results."""


def check(config: ScaleConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    for name in ("replicas", "policies"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} must name some, each once: {' '.join(map(str, values))}")
    check_policies(config.policies)
    check_at_least_one(
        config, "replicas", "requests", "at_once", "families", "shared_tokens", "own_tokens",
        "tokens", "chunk_size",
    )  # fmt: skip
    longest = config.shared_tokens + config.own_tokens + config.tokens
    if config.pool_tokens < 2 * longest:
        raise UserError(
            f"--pool-tokens {config.pool_tokens} must hold two requests of {longest} tokens"
        )
    if config.kills < 0:
        raise UserError(f"--kills must be at least 0, got {config.kills}")
    check_seed(config.seed)
