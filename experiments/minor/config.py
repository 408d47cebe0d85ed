"""The options of `minor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.harness.errors import UserError
from experiments.harness.options import (
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.sampling import MOST_TEMPERATURE


@dataclass(frozen=True)
class MinorConfig:
    """Measure what of a long generation no recent query found important, token by token as CORM
    drops it, and in whole chunks."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "rows": 2,
        "max_tokens": 40,
        "recent": (8,),
        "chunk_sizes": (16,),
    }

    model: ModelName = "smollm2"

    system_prompt: Annotated[Path | None, by_default("FILE", "the shipped one")] = None
    """A text file with the system prompt that all answers share."""

    prompts: Annotated[Path | None, by_default("FILE", "the 32 shipped ones")] = None
    """Questions, one a line, or JSON lines of `text` (a question) or `tokens` (a whole prompt)."""

    rows: int = 4
    """How many of the prompts are answered, from the first on."""

    max_tokens: int = 2048
    """Tokens of an answer; it goes on when it has ended."""

    temperature: float = 1.0
    """Randomness of sampling; 0 takes the likeliest token."""

    recent: tuple[int, ...] = (256, 128, 512)
    """Queries that must all have found a token unimportant, and the newest tokens, which stay."""

    chunk_sizes: tuple[int, ...] = (16, 64)
    """Tokens in a chunk of the KV cache."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of sampling (answer i uses seed + i) and of random weights and prompts."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/minor-TIME")] = None
    """Folder for the results."""


def check(config: MinorConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "rows", "max_tokens", "recent", "chunk_sizes", "max_positions")
    for name in ("recent", "chunk_sizes"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            given = " ".join(map(str, values)) or "none"
            raise UserError(f"--{name.replace('_', '-')} takes one or more, each once; got {given}")
    if not 0 <= config.temperature <= MOST_TEMPERATURE:
        raise UserError(f"--temperature must be 0 or more, got {config.temperature}")
    check_seed(config.seed)
