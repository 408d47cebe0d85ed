"""The options of `gradients`."""

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

SIDES = {
    "tree": "each prefix once",
    "padded": "one sequence after another, jax.nn.dot_product_attention",
}


@dataclass(frozen=True)
class GradientsConfig:
    """Log-probabilities of groups of answers to one prompt, and the gradients of all weights: with
    the prompt computed once, and in every sequence."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "prompts": (40,),
        "groups": (3,),
        "tokens": 8,
        "repeats": 1,
    }

    model: ModelName = "random:small"

    prompts: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of the prompt."""

    groups: tuple[int, ...] = (4, 8, 16)
    """Answers to the prompt."""

    tokens: int = 128
    """Tokens of an answer."""

    repeats: int = 3
    """Times each side is timed, in turns; the median is reported."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of the tokens, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/gradients-TIME")] = None
    """Folder for the results."""


def check(config: GradientsConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "prompts", "groups", "tokens", "repeats", "max_positions")
    check_seed(config.seed)
