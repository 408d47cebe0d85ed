"""The work of `compile-report`: compile the kernels, then the programs, and tell what they need."""

from __future__ import annotations

import itertools
from typing import Any

from experiments.compile_report.config import CompileReportConfig
from experiments.compile_report.programs import whole_programs
from experiments.compile_report.target import GpuTarget, target_named
from experiments.compile_report.variants import variant_names
from experiments.compile_report.views import failures_of
from experiments.compile_report.worker import compile_cases
from experiments.harness.environment import describe_deviceless
from experiments.harness.progress import phase_display
from experiments.harness.results import ResultFolder
from experiments.harness.units import tell_taken_over
from experiments.harness.views import finish

_VARIANTS = "experiments.compile_report.variants:kernel_variants"
_PROGRAMS = "experiments.compile_report.programs:whole_programs"


def compile_everything(config: CompileReportConfig, folder: ResultFolder) -> dict[str, Any]:
    """Compile into `folder` what the run before it, if it was broken off, has not compiled."""
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
    return finish(folder, summary)


def _cases(config: CompileReportConfig, target: GpuTarget) -> list[tuple[str, str, list[str], int]]:
    """Kind, table, names and cases per process of what is to be compiled."""
    backends = tuple(name for name in config.backends if name in target.backends)
    cases = []
    if config.variants != "none":
        names = variant_names(backends, config.variants == "every")
        cases.append(("kernel", _VARIANTS, names, 8))
    if config.programs:
        names = list(whole_programs(implementations=("xla", *backends)))
        cases.append(("program", _PROGRAMS, names, 1))
    return cases
