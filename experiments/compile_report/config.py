"""The options of `compile-report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_at_least_one

Gpu = Literal["h200", "h100", "a100"]
Backend = Literal["pallas_triton", "pallas_mosaic_gpu"]
Variants = Literal["some", "every", "none"]


@dataclass(frozen=True)
class CompileReportConfig:
    """Compile the GPU kernels and the whole programs without a GPU, and report what they need."""

    SMOKE: ClassVar[dict[str, Any]] = {"backends": ("pallas_triton",), "programs": False}

    gpu: Gpu = "h200"
    """The GPU to compile for."""

    backends: tuple[Backend, ...] = ("pallas_triton", "pallas_mosaic_gpu")
    """Whose kernels to compile."""

    variants: Variants = "some"
    """Every combination of dtype, head size, chunk size and group of heads, or some of them."""

    programs: bool = True
    """Also compile the decode loop, on one GPU, four and eight, and the prefill call."""

    processes: int = 2
    """Cases compiled at a time."""

    keep_dumps: bool = False
    """Keep the compiler's HLO, PTX and buffer assignments in the folder, some MB a case."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/compile-report-TIME")] = None
    """Folder for the results: `results.jsonl` has a line for each variant and program."""


def check(config: CompileReportConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "processes")
    if config.programs:
        return
    if config.variants == "none":
        raise UserError("--variants none and --no-programs leave nothing to compile")
    if not config.backends:
        raise UserError(
            "--backends names nothing to compile, and --no-programs leaves nothing else"
        )
    from experiments.compile_report.target import target_named

    runs = target_named(config.gpu).backends
    if not set(config.backends) & set(runs):
        raise UserError(
            f"--no-programs leaves nothing to compile: --gpu {config.gpu} does not run "
            f"{' '.join(config.backends)} of --backends, only {' '.join(runs)}"
        )
