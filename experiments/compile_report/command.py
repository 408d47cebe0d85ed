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

from typing import Any

from experiments.compile_report.config import CompileReportConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.errors import CheckFailed
from experiments.harness.runs import open_results


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
        from experiments.compile_report.run import compile_everything

        summary = compile_everything(config, folder)
    if summary["failures"]:
        raise CheckFailed(f"{'; '.join(summary['failures'])}; see {folder.results_path}", summary)
    return summary


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    return {name: summary[name] for name in ("variants", "programs")}


COMPILE_REPORT = Experiment("compile-report", CompileReportConfig, run, check, headline)
