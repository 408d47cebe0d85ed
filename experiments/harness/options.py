"""What the configs of all subcommands need to describe their options."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import tyro

from experiments.harness.errors import UserError

MOST_SEED = 2**31 - 1


def by_default(metavar: str, meaning: str) -> Any:
    """How `--help` shows an option whose None stands for `meaning`."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {meaning})")


ModelName = Annotated[
    str,
    tyro.conf.arg(
        help="`smollm2` (downloaded once), a GGUF file, a folder with a Hugging Face checkpoint, "
        "ORG/NAME[@REVISION] to fetch from the hub, or `random:PRESET` (random weights: nothing "
        "to download)."
    ),
]
"""The option `--model`; see `experiments.loading.parse_model`."""

AttentionImplementation = Annotated[
    Literal["xla", "native", "pallas_triton", "pallas_mosaic_gpu", "reference"] | None,
    tyro.conf.arg(
        metavar="{xla,native,pallas_triton,pallas_mosaic_gpu,reference}",
        help="The attention implementation.",
        help_behavior_hint="(default: the best for the device)",
    ),
]
"""The option `--implementation` of all that run an engine by a chosen one."""

MaxPositions = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="INT",
        help="Most tokens of a sequence. Models with LongRoPE need it: at most their original "
        "context.",
        help_behavior_hint="(default: as many as the model has)",
    ),
]
"""The option `--max-positions` of all that load a model."""


def option(name: str) -> str:
    """The option on the command line that sets the config's field `name`."""
    return f"--{name.replace('_', '-')}"


def boolean_option(name: str, value: bool) -> str:
    """The option on the command line that switches the config's field `name` on or off."""
    return option(name) if value else option(f"no_{name}")


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise `UserError` for a field of `config` below 1, or with one below; None is fine."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number < 1 for number in numbers):
            raise UserError(f"{option(name)} must be at least 1, got {value}")


def check_above_zero(config: Any, *names: str) -> None:
    """Raise `UserError` for a field of `config` that is no finite number above 0; None is fine."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option(name)} must be a number above 0, got {value}")


def check_seed(seed: int) -> None:
    """Raise `UserError` for a `--seed` that JAX or NumPy could not take."""
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"--seed must be from 0 to {MOST_SEED}, got {seed}")
