"""`python -m experiments compile-report`: what the GPU kernels and programs need, with no GPU.

JAX's CUDA plugin compiles for a described GPU on any Linux machine. Every kernel variant is
compiled and its registers, spills, shared memory and occupancy are told; then the decode loop and a
prefill call of an 8B model, with their temporaries, and whether they copy the pool. A kernel that
spills, a program that copies the pool, and one that does not compile are failures.

    pip install 'jax_chunkattn[experiments,gpu-check]'
    python -m experiments compile-report
    python -m experiments compile-report --backends pallas_triton --variants every --gpu a100
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from experiments.harness.commands import Experiment
from experiments.harness.errors import CheckFailed, UserError
from experiments.harness.options import by_default, check_at_least_one
from experiments.harness.results import ResultFolder, open_results

if TYPE_CHECKING:
    from experiments.compile_report.target import GpuTarget

Gpu = Literal["h200", "h100", "a100"]
Backend = Literal["pallas_triton", "pallas_mosaic_gpu"]
Variants = Literal["some", "every", "none"]

_VARIANTS = "experiments.compile_report.variants:kernel_variants"
_PROGRAMS = "experiments.compile_report.programs:whole_programs"


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
    """Also compile the decode loop, on one GPU and on four, and the prefill call."""

    processes: int = 2
    """Cases compiled at a time."""

    keep_dumps: bool = False
    """Keep the compiler's HLO, PTX and buffer assignments in the folder, some MB a case."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/compile-report-TIME")] = None
    """Folder for the results: `results.jsonl` has a line for each variant and program."""


def run(config: CompileReportConfig) -> dict[str, Any]:
    """Compile, print the tables, and return the summary.

    Raises:
      UserError: this machine cannot compile for a GPU.
      CheckFailed: something spills, copies the pool or does not compile; the results are written.
    """
    check(config)
    from experiments.compile_report.target import check_installed

    check_installed()
    with open_results("compile-report", config) as folder:
        summary, failures = _compile(config, folder)
    if failures:
        raise CheckFailed(f"{'; '.join(failures)}; see {folder.results_path}", summary)
    return summary


def _compile(config: CompileReportConfig, folder: ResultFolder) -> tuple[dict[str, Any], list[str]]:
    from experiments.compile_report.target import target_named
    from experiments.compile_report.views import failures_of
    from experiments.compile_report.worker import compile_cases
    from experiments.harness.environment import describe_deviceless
    from experiments.harness.progress import phase_display
    from experiments.harness.units import tell_taken_over
    from experiments.harness.views import finish

    target = target_named(config.gpu)
    dump = folder.path / "dumps" if config.keep_dumps else None
    found: dict[str, list[dict[str, Any]]] = {}
    environment = describe_deviceless()
    folder.begin(environment)
    with phase_display() as display:
        for kind, table, names, per_process in _cases(config, target):
            tell_taken_over(folder, dict.fromkeys(names))
            left = [name for name in names if name not in folder.finished]
            phase, done = f"compiling {kind}s", itertools.count(len(names) - len(left) + 1)
            display.update(phase, len(names) - len(left), len(names))

            def keep(record, kind=kind, phase=phase, total=len(names), done=done) -> None:
                folder.finish_unit(record["name"], {"kind": kind, "gpu": config.gpu, **record})
                display.update(phase, next(done), total)

            compile_cases(
                table,
                left,
                target,
                per_process=per_process,
                processes=config.processes,
                dump=dump,
                on_record=keep,
            )
            found[kind] = [one for one in folder.finished.values() if one["kind"] == kind]
    failures = [failure for records in found.values() for failure in failures_of(records)]
    summary = {
        "experiment": "compile-report",
        "gpu": config.gpu,
        "variants": len(found.get("kernel", [])),
        "programs": len(found.get("program", [])),
        "failures": failures,
        "device_kind": target.device_kind,
        "environment": environment,
    }
    return finish(folder, summary), failures


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


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    return {name: summary[name] for name in ("variants", "programs")}


def _cases(config: CompileReportConfig, target: GpuTarget) -> list[tuple[str, str, list[str], int]]:
    """Kind, table, names and cases per process of what is to be compiled."""
    backends = tuple(name for name in config.backends if name in target.backends)
    cases = []
    if config.variants != "none":
        from experiments.compile_report.variants import variant_names

        names = variant_names(backends, config.variants == "every")
        cases.append(("kernel", _VARIANTS, names, 8))
    if config.programs:
        from experiments.compile_report.programs import whole_programs

        names = list(whole_programs(implementations=("xla", *backends)))
        cases.append(("program", _PROGRAMS, names, 1))
    return cases


COMPILE_REPORT = Experiment("compile-report", CompileReportConfig, run, check, headline)
