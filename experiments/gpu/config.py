"""The options of `gpu`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import check_above_zero, check_seed

Part = Literal[
    "target",
    "correctness",
    "tokens",
    "command-buffers",
    "floors",
    "paper",
    "trees",
    "hydragen",
    "decode",
    "tune",
]
RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where results that are committed are."""


@dataclass(frozen=True)
class GpuConfig:
    """Check and time everything on an NVIDIA GPU, against its limits and its peers."""

    SMOKE: ClassVar[dict[str, Any]] = {"dry_run": True, "part": ("target", "floors")}

    part: tuple[Part, ...] = tuple(name for name in get_args(Part) if name != "tune")
    """What to do, in this order."""

    minutes: float = 8.0
    """Time for all parts together. What does not fit is left out, and this is said."""

    dry_run: bool = False
    """Rehearse on the CPU, with tiny cases: no time is worth anything."""

    compile_only: bool = False
    """Compile the programs of all parts for an H200, with no GPU, and run nothing."""

    seed: int = 0
    """Seed of keys, values, queries, weights and prompts."""

    output: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help_behavior_hint="(default: experiments/results/DEVICE-DATE/gpu; runs/gpu-TIME "
            "without a GPU)",
        ),
    ] = None
    """Folder for the results: `results.jsonl` has a line for each measurement."""

    @property
    def mode(self) -> Literal["measure", "dry-run", "compile-only"]:
        if self.dry_run:
            return "dry-run"
        return "compile-only" if self.compile_only else "measure"


def check(config: GpuConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    known = get_args(Part)
    for part in config.part:
        if part not in known:
            raise UserError(f"--part: unknown {part!r}; known: {', '.join(known)}")
    if not config.part:
        raise UserError("--part names nothing to do")
    if len(set(config.part)) < len(config.part):
        raise UserError(f"--part names one twice: {' '.join(config.part)}")
    check_above_zero(config, "minutes")
    if config.dry_run and config.compile_only:
        raise UserError("--dry-run and --compile-only exclude each other")
    chosen = config.output.resolve().parents if config.output else ()
    if config.mode != "measure" and RESULTS in chosen:
        raise UserError(f"--output: {RESULTS} is for what was measured on a device")
    check_seed(config.seed)
