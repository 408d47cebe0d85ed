"""The options of `tree`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_at_least_one


@dataclass(frozen=True)
class TreeConfig:
    """Measure the prefix tree: time and memory as it grows, and the time to plan a batch."""

    SMOKE: ClassVar[dict[str, Any]] = {"chunks": 2_000, "children": (1, 100), "samples": 10}

    chunks: int = 1_000_000
    """Nodes of the largest tree; powers of ten from 1,000 up are measured on the way."""

    prompt_tokens: int = 4096
    """Tokens of the prompts that are matched and inserted."""

    chunk_size: int = 64
    """Tokens in a chunk."""

    children: tuple[int, ...] = (1, 1_000, 100_000)
    """Numbers of children of the root to measure at."""

    samples: int = 200
    """Prompts timed for each number that is reported, as their median and 95th percentile."""

    seed: int = 0
    """Seed of the prompts."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/tree-TIME")] = None
    """Folder for the results."""


def check(config: TreeConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "chunks", "prompt_tokens", "chunk_size", "samples", "children")
    if config.prompt_tokens < 2 * config.chunk_size:
        raise UserError(
            f"--prompt-tokens {config.prompt_tokens} must fill at least two chunks of "
            f"--chunk-size {config.chunk_size}"
        )
    if config.seed < 0:
        raise UserError(f"--seed must be at least 0, got {config.seed}")
