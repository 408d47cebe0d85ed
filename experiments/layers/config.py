"""The options of `layers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.select_option import POLICIES, check_choices


@dataclass(frozen=True)
class LayersConfig:
    """Find the layers that mind most when their queries read a part of the chunks before them, and
    write those that should read everything into a file that `--dense-layers` takes."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "dense": 1,
        "prefix": 128,
        "window": 16,
        "windows": 2,
        "chunk_size": 16,
        "prefill_tokens": 32,
    }

    model: ModelName = "smollm2"

    select: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(POLICIES)}}}:SHARE")] = "scores:0.2"
    """The policy, and the share of the chunks before it that a query reads by it."""

    dense: int = 6
    """Layers that are to read everything."""

    text: Annotated[Path | None, by_default("FILE", "Python's own help")] = None
    """UTF-8 text to score."""

    prefix: int = 3072
    """Tokens that all windows have before them; whole chunks."""

    window: int = 512
    """Tokens of a window of text; all are scored."""

    windows: int = 2
    """Windows, one after another in the text."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    prefill_tokens: Literal[32, 128, 512] = 512
    """Most tokens that one call of prefill computes."""

    implementation: AttentionImplementation = None

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/layers-TIME")] = None
    """Folder for the results, and for the file, `dense_layers.json`."""


def check(config: LayersConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    names = "dense", "prefix", "window", "windows", "chunk_size", "max_positions"
    check_at_least_one(config, *names)
    check_seed(config.seed)
    check_choices((config.select,), config.chunk_size)
    if config.prefix % config.chunk_size:
        raise UserError(
            f"--prefix must be whole chunks of {config.chunk_size} tokens, got {config.prefix}"
        )
    if config.prefill_tokens < config.chunk_size:
        raise UserError(
            f"--prefill-tokens {config.prefill_tokens} do not fill a chunk of {config.chunk_size}"
        )
