"""The options of `engine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import (
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads

DETERMINISTIC = "deterministic engine"
ON_A_MESH = "engine on a mesh"
SIDES = ("bare loop", "engine", DETERMINISTIC, ON_A_MESH)


@dataclass(frozen=True)
class EngineConfig:
    """Compare the engine's speed with that of the bare decode loop at the same shapes, and with its
    own where it is deterministic, or on a mesh."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "rows": 4,
        "shared_tokens": 64,
        "tokens": 32,
        "rounds": 2,
    }

    model: ModelName = "smollm2"

    rows: int = 32
    """Requests decoded at once."""

    shared_tokens: int = 2048
    """Tokens that all prompts begin with."""

    own_tokens: int = 16
    """Tokens of each prompt behind them."""

    tokens: int = 64
    """Tokens decoded for each row."""

    steps_per_call: int = 8
    """Tokens decoded for each row in one call to the device."""

    rounds: int = 5
    """How often each side is timed, in turns; the medians are reported."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    deterministic: bool = False
    """Time an engine of `deterministic=True` too, where there is the compiled kernel."""

    mesh_of_one: bool = False
    """Time an engine on a mesh of one device too: what a mesh costs by itself."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    heads: HeadsFolder = None

    head_share: HeadShare = None

    seed: int = 0
    """Seed of the prompts, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/engine-TIME")] = None
    """Folder for the results."""


def check(config: EngineConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(
        config, "rows", "own_tokens", "steps_per_call", "rounds", "chunk_size", "max_positions"
    )
    if config.shared_tokens < 0:
        raise UserError(f"--shared-tokens must be from 0 up, got {config.shared_tokens}")
    if config.tokens < 4 * config.steps_per_call:
        raise UserError(
            f"--tokens must be at least {4 * config.steps_per_call}, four calls of "
            f"{config.steps_per_call}, got {config.tokens}"
        )
    check_seed(config.seed)
    check_heads(config)
