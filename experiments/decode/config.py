"""The options of `decode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads

Side = Literal["shared", "unshared"]


@dataclass(frozen=True)
class DecodeConfig:
    """Time decoding over the completion, the batch, the shared prefix, the chunk or the call."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "points": (16, 32),
        "max_positions": 1024,
        "rows": 8,
        "own_tokens": 8,
        "chunk_size": 16,
        "tokens": 32,
        "rounds": 2,
        "check_tokens": 8,
    }

    study: Literal["completion", "batch", "shared", "chunk-size", "steps"] = "completion"
    """What is varied."""

    points: Annotated[tuple[int, ...] | None, by_default("INT ...", "those of the study")] = None
    """Values of what is varied."""

    sides: tuple[Side, ...] = ("shared", "unshared")
    """What is timed, in turns."""

    model: ModelName = "random:small"

    shared_tokens: Annotated[
        tuple[int, ...] | None,
        by_default(
            "INT ...", "1024 2048 4096 for completion, else 2048; halved to fit max-positions"
        ),
    ] = None
    """Tokens that all prompts begin with; several make as many series. The study `shared` takes
    `points` instead."""

    rows: int = 32
    """Rows decoded at once, unless the study varies them."""

    own_tokens: int = 16
    """Tokens of each prompt behind the shared ones."""

    tokens: int = 32
    """Tokens decoded for each row, unless the study varies them."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache, unless the study varies them."""

    steps_per_call: int = 8
    """Tokens decoded for each row in one call to the device, unless the study varies them."""

    rounds: int = 3
    """How often each side is timed, in turns; the medians are reported."""

    check_tokens: int = 16
    """Tokens of the answers to real prompts that are compared; 0 leaves the comparison out."""

    memory_gb: float = 8.0
    """Gigabytes (10^9 bytes) that the keys and values of a point may take, both sides together."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, activations and KV cache."""

    implementation: AttentionImplementation = None

    max_positions: MaxPositions = None

    heads: HeadsFolder = None

    head_share: HeadShare = None

    seed: int = 0
    """Seed of keys and values, and of random weights and prompts."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/decode-TIME")] = None
    """Folder for the results: `results.jsonl` has every time that was taken."""


def check_options(config: DecodeConfig) -> None:
    """Raise `UserError` for an option that no study could use."""
    names = ("rows", "own_tokens", "tokens", "chunk_size", "steps_per_call", "rounds")
    check_at_least_one(config, *names, "max_positions")
    if config.study != "shared":
        check_at_least_one(config, "points")
    check_above_zero(config, "memory_gb")
    check_seed(config.seed)
    check_heads(config)
    _check_from_zero("--points", config.points)
    _check_from_zero("--shared-tokens", config.shared_tokens)
    _check_from_zero("--check-tokens", (config.check_tokens,))
    if not config.sides or len(set(config.sides)) < len(config.sides):
        named = " ".join(config.sides) or "none"
        raise UserError(f"--sides must name one side or both, each once, got {named}")
    if config.study == "shared" and config.shared_tokens is not None:
        raise UserError(
            "--study shared varies the shared tokens: give them as --points, not --shared-tokens"
        )


def _check_from_zero(option: str, values: tuple[int, ...] | None) -> None:
    if values is None:
        return
    if not values or min(values) < 0 or len(set(values)) < len(values):
        given = " ".join(map(str, values)) or "nothing"
        raise UserError(f"{option} must be different numbers from 0 up, got {given}")
