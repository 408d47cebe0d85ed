"""The options of `quality`."""

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
    check_at_least_one,
    check_seed,
)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class QualityConfig:
    """Compare a model's perplexity through the shared cache with that of a plain forward pass."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "dtypes": ("float32",),
        "prefix": 64,
        "window": 12,
        "windows": 8,
        "chunk_size": 16,
        "prefill_tokens": 32,
    }

    model: ModelName = "smollm2"

    text: Annotated[
        Path | None, by_default("FILE", "the system prompt and questions that ship with this")
    ] = None
    """UTF-8 text to score."""

    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
    """Types of weights, activations and KV cache, one after another."""

    prefix: int = 1024
    """Tokens that all windows have before them; whole chunks."""

    window: int = 64
    """Tokens of a window; all are scored."""

    windows: int = 16
    """Windows, one after another in the text; they are decoded together."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    prefill_tokens: Literal[32, 128, 512] = 512
    """Most tokens that one call of prefill computes."""

    implementation: AttentionImplementation = None

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/quality-TIME")] = None
    """Folder for the results: `results.jsonl` has every log-probability."""


def check(config: QualityConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "prefix", "window", "windows", "chunk_size", "max_positions")
    if not config.dtypes or len(set(config.dtypes)) < len(config.dtypes):
        given = " ".join(config.dtypes)
        raise UserError(f"--dtypes must name one type or more, each once, got {given or 'none'}")
    if config.prefix % config.chunk_size:
        raise UserError(
            f"--prefix must be a multiple of --chunk-size {config.chunk_size}, of which only whole "
            f"ones are shared, got {config.prefix}"
        )
    check_seed(config.seed)
