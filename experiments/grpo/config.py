"""The options of `grpo`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import (
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)

WAYS = {
    "shared": "instructions and questions once",
    "unshared": "every sample by itself",
}
HEAD_DIM = 16


@dataclass(frozen=True)
class GrpoConfig:
    """Train a small decoder from scratch by GRPO to copy, reverse or sort digits: sampled by the
    engine and trained through the tree of its samples, and beside it without sharing."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "instructions": 20,
        "digits": 2,
        "prompts": 2,
        "samples": 3,
        "steps": 4,
        "save_every": 2,
        "layers": 1,
        "hidden": 32,
    }

    task: Literal["copy", "reverse", "sort"] = "copy"
    """What the answer is to be."""

    digits: int = 2
    """Digits of a question, and of its answer."""

    instructions: int = 64
    """Tokens that all questions stand behind, as behind a long system prompt."""

    prompts: int = 16
    """Questions of a step."""

    samples: int = 16
    """Answers to each of them."""

    steps: int = 400
    """Steps, each with new questions."""

    rate: float = 1e-3
    """Learning rate of Adam."""

    clip: float = 0.2
    """How far a token's probability may move before it counts no more."""

    kl: float = 0.04
    """Weight of the divergence from the first weights."""

    layers: int = 2
    """Layers of the decoder."""

    hidden: int = 64
    """Its width; heads of 16, two for each KV head."""

    ways: tuple[Literal["shared", "unshared"], ...] = ("shared", "unshared")
    """A training each, of the same questions from the same weights."""

    save_every: int = 50
    """Steps after which the state is saved, to go on from."""

    seed: int = 0
    """Seed of the weights, questions and samples."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/grpo-TIME")] = None
    """Folder for the results."""

    @property
    def prompt_tokens(self) -> int:
        """Instructions, a sign, the digits, and a sign."""
        return self.instructions + self.digits + 2


def check(config: GrpoConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    counts = ("instructions", "digits", "prompts", "steps", "layers", "hidden", "save_every")
    check_at_least_one(config, *counts)
    check_above_zero(config, "rate", "clip")
    if config.samples < 2:
        raise UserError(f"--samples must be at least 2 to compare, got {config.samples}")
    if config.hidden % (2 * HEAD_DIM):
        raise UserError(
            f"--hidden must be a multiple of {2 * HEAD_DIM}, two heads of {HEAD_DIM}, got "
            f"{config.hidden}"
        )
    if not 0 <= config.kl < math.inf:
        raise UserError(f"--kl must be a number from 0 up, got {config.kl}")
    if not config.ways or len(set(config.ways)) < len(config.ways):
        raise UserError(f"--ways must name one or both ways, got {' '.join(config.ways)}")
    check_seed(config.seed)
