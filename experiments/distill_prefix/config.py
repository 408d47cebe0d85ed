"""The options of `distill-prefix`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

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
class DistillPrefixConfig:
    """Train a few virtual tokens to stand for a long system prompt, and write a folder that
    `generate --prefix`, `models.prefixes.load_prefix` and Hugging Face's peft take."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "tokens": 16,
        "chunk_size": 16,
        "answers": 2,
        "max_tokens": 8,
        "held_out": 2,
        "steps": 4,
        "warmup": 1,
        "save_every": 2,
    }

    model: ModelName = "smollm2"

    system_prompt: Annotated[Path | None, by_default("FILE", "the shipped one")] = None
    """A text file with the system prompt that the prefix shall stand for."""

    prompts: Annotated[Path | None, by_default("FILE", "the 32 shipped ones")] = None
    """Questions to learn from, one a line, or JSON lines of `text`."""

    tokens: int = 64
    """Virtual tokens of the prefix: whole chunks."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache that will hold it."""

    answers: int = 4
    """Answers to each question, drawn behind the system prompt, whose probabilities are learned."""

    max_tokens: int = 48
    """The most tokens of an answer."""

    held_out: int = 8
    """Questions, the last ones, that nothing is learned from; the prefix is measured with them."""

    steps: int = 120
    """Steps of the optimiser."""

    batch: int = 2
    """Answers of a step."""

    rate: float = 1e-2
    """Highest learning rate; it ends with a tenth of that."""

    warmup: int = 5
    """Steps in which the learning rate rises."""

    minutes: Annotated[float | None, by_default("FLOAT", "until all steps are done")] = None
    """End at the first save after so many minutes of training, wherever it then is: two such runs
    differ."""

    save_every: int = 20
    """Steps after which the state is saved, to go on from, and the prefix measured."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of the answers, of the order in which they are read, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/distill-prefix-TIME")] = None
    """Folder for the results; the prefix is its folder `prefix`."""


def check(config: DistillPrefixConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    names = ("tokens", "chunk_size", "answers", "max_tokens", "held_out", "steps", "batch")
    check_at_least_one(config, *names, "save_every", "max_positions")
    check_above_zero(config, "rate", "minutes")
    if config.tokens % config.chunk_size:
        raise UserError(
            f"--tokens must fill whole chunks of --chunk-size {config.chunk_size}, got "
            f"{config.tokens}"
        )
    if not 0 <= config.warmup <= config.steps:
        raise UserError(f"--warmup must be from 0 to --steps {config.steps}, got {config.warmup}")
    check_seed(config.seed)
