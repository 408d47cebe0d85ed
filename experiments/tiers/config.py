"""The options of `tiers`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.codecs import CodecName, check_used_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.trace import BLOCK_TOKENS

WAYS = {
    "computed": "computed, by an engine without tiers",
    "kept": "computed, and written to the disk",
    "pool": "in the pool",
    "memory": "in memory of the host",
    "disk": "on the disk, found by another engine, in the system's cache of files",
    "disk alone": "on the disk, not in the system's cache",
}


@dataclass(frozen=True)
class TiersConfig:
    """Time to the first token of prompts that begin with what is in the pool, in memory of the
    host, on a disk, or nowhere."""

    SMOKE: ClassVar[dict[str, Any]] = {"model": "random:tiny", "lengths": [128], "repeats": 1}

    model: ModelName = "smollm2"

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8128)
    """Tokens that the prompts begin with."""

    tokens: int = 16
    """Tokens behind them, which are always computed."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    codec: CodecName = "identity"

    trace: Annotated[Path | None, by_default("FILE", "a model is timed")] = None
    """Instead of timing a model, tell what tiers find of a trace in the format of Mooncake's
    releases."""

    pool_tokens: int = 1_000_000
    """With --trace: size of the pool."""

    host_tokens: int = 4_000_000
    """With --trace: tokens that memory of the host holds."""

    disk_tokens: int = 40_000_000
    """With --trace: tokens that the disk holds."""

    disk: Annotated[Path | None, by_default("FOLDER", "that of the results")] = None
    """Where files are kept meanwhile."""

    repeats: int = 3
    """Rounds; in each, everything is timed once."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of the tokens, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/tiers-TIME")] = None
    """Folder for the results."""


def check(config: TiersConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "tokens", "chunk_size", "repeats", "max_positions")
    for name in ("pool_tokens", "host_tokens", "disk_tokens"):
        if getattr(config, name) < BLOCK_TOKENS:
            raise UserError(f"--{name.replace('_', '-')} must be at least {BLOCK_TOKENS}, a block")
    if config.trace is None and not hasattr(os, "posix_fadvise"):
        raise UserError("tiers needs posix_fadvise, which this system has not; --trace works")
    check_used_codec(config.codec)
    check_seed(config.seed)
    if not config.lengths or min(config.lengths) < config.chunk_size:
        raise UserError(f"--lengths must be at least a chunk of {config.chunk_size} tokens")
    if config.tokens > config.chunk_size:
        raise UserError("--tokens must not be more than --chunk-size: they are in no whole chunk")
