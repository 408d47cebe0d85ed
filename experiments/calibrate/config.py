"""The options of `calibrate`."""

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


@dataclass(frozen=True)
class CalibrateConfig:
    """Fit codecs of 4, 3 and 2 bits to a model's keys and values, each into a file that `--codec`
    takes."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "windows": 2,
        "window": 64,
        "stride": 1,
    }

    model: ModelName = "smollm2"

    codec: tuple[str, ...] = ("nuq4", "nuq3", "nuq2")
    """What to fit: `nuq4`, `nuq3` or `nuq2`, or two of these for keys and values, as in
    `nuq4/nuq3`."""

    ladder: Annotated[Literal[4, 3, 2] | None, by_default("{4,3,2}", "none")] = None
    """Fit instead the steps that lead to the codec of so many bits, from rounding token by token
    on."""

    outliers: float = 0.01
    """Share of a chunk's numbers that are stored as they are."""

    text: Annotated[Path | None, by_default("FILE", "the second half of Python's own help")] = None
    """UTF-8 text to calibrate with; `quality --codec` scores the beginning of Python's help."""

    windows: int = 16
    """Pieces of the text, spread over it."""

    window: int = 1024
    """Tokens of a piece, each read by itself."""

    stride: int = 2
    """Of so many tokens one is sampled."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations; the files do for any."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/calibrate-TIME")] = None
    """Folder for the results: `nuq4.safetensors` and so on."""


def check(config: CalibrateConfig) -> None:
    """Raise `UserError` or `CodecError` for a value that no run could use."""
    from models.calibration import recipe_of

    check_at_least_one(config, "windows", "window", "stride", "max_positions")
    if not 0 <= config.outliers < 1:
        raise UserError(f"--outliers must be at least 0 and below 1, got {config.outliers}")
    if not config.codec or len(set(config.codec)) < len(config.codec):
        given = " ".join(config.codec) or "none"
        raise UserError(f"--codec must name one codec or more, each once, got {given}")
    for name in config.codec:
        recipe_of(name)
    if config.windows * (config.window // config.stride) < 64:
        raise UserError(
            f"--windows {config.windows} of --window {config.window} tokens, one in --stride "
            f"{config.stride}, are too few to fit anything: 64 at least"
        )
    check_seed(config.seed)
