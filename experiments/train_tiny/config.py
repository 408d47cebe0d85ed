"""The options of `train-tiny`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.harness.errors import UserError
from experiments.harness.options import (
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)


@dataclass(frozen=True)
class TrainTinyConfig:
    """Train a small GPT-2 over bytes, with as many KV heads as query heads, from scratch on a text,
    and write a checkpoint that `--model` takes."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "layers": 2,
        "heads": 4,
        "hidden": 32,
        "context": 64,
        "steps": 4,
        "batch": 2,
        "warmup": 1,
        "save_every": 2,
        "short": 16,
        "held_out": 512,
    }

    layers: int = 6
    """Layers of the model."""

    heads: int = 8
    """Query heads of a layer; each has keys and values of its own."""

    hidden: int = 128
    """Width of the model: the heads' together."""

    context: int = 512
    """Tokens of a sequence, which are bytes: the positions that the model has."""

    text: Annotated[Path | None, by_default("FILE", "Python's own help")] = None
    """UTF-8 text to train on."""

    held_out: int = 32_768
    """Bytes at the beginning of the text that are not trained on; the model is scored with them."""

    steps: int = 2400
    """Steps of the optimiser."""

    batch: int = 1
    """Sequences of a step, of --context tokens each."""

    short: int = 64
    """Tokens of the sequences that are read first, so many more in a step: they take less time,
    and stand at any position."""

    short_share: float = 0.85
    """Share of the steps that read short sequences; those behind them read whole ones."""

    rate: float = 2e-3
    """Highest learning rate; it ends with a tenth of that."""

    warmup: int = 100
    """Steps in which the learning rate rises."""

    minutes: Annotated[float | None, by_default("FLOAT", "until all steps are done")] = None
    """End at the first save after so many minutes of training, wherever it then is: two such runs
    differ."""

    save_every: int = 200
    """Steps after which the state is saved, to go on from, and the model scored."""

    seed: int = 0
    """Seed of the first weights, and of the order in which the text is read."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/train-tiny-TIME")] = None
    """Folder for the results; the checkpoint is its folder `model`."""


def check(config: TrainTinyConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    names = ("layers", "heads", "hidden", "context", "steps", "batch", "short", "save_every")
    check_at_least_one(config, *names)
    check_above_zero(config, "rate", "minutes")
    if config.hidden % config.heads:
        raise UserError(
            f"--hidden must be a multiple of --heads {config.heads}, got {config.hidden}"
        )
    if config.context % config.short:
        raise UserError(f"--short must divide --context {config.context}, got {config.short}")
    if not 0 <= config.short_share <= 1:
        raise UserError(f"--short-share must be from 0 to 1, got {config.short_share}")
    if config.held_out <= config.context:
        raise UserError(
            f"--held-out must be more than --context {config.context:,}, got {config.held_out:,}"
        )
    if not 0 <= config.warmup <= config.steps:
        raise UserError(f"--warmup must be from 0 to --steps {config.steps}, got {config.warmup}")
    check_seed(config.seed)
