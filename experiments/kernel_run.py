"""The kernel experiment itself: cases one after another, timed, checked and recorded."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from experiments.harness import timing
from experiments.harness.compilations import count_compilations
from experiments.harness.environment import describe_environment, max_rss_bytes
from experiments.harness.results import ResultFolder
from experiments.kernel import Implementation, KernelConfig
from experiments.kernel_report import KernelReport
from experiments.kernel_sides import (
    CaseOperands,
    Checker,
    bytes_per_token,
    make_operands,
    make_sides,
    runnable_implementations,
    skip_reasons,
)
from pallas_kernels import specs
from pallas_kernels.specs import AttentionCase

SUITES = {"smoke": specs.SMOKE, "paper": specs.PAPER}

_MATMUL, _READ = "matrix product", "memory read"


def run_suite(config: KernelConfig, folder: ResultFolder) -> dict[str, Any]:
    """Measure every case of the suite; returns the summary, JSON values only."""
    started = time.perf_counter()
    if config.implementations is None:
        config = dataclasses.replace(config, implementations=runnable_implementations())
    report = KernelReport()
    folder.begin(describe_environment())
    records = []
    with count_compilations() as compilations:
        for case in SUITES[config.suite]:
            with report.working_on(case.name):
                record = measure_case(case, config)
            folder.write_record({"kind": "case", **record})
            report.print_case(record)
            records.append(record)
    report.print_overview(records)
    summary = {
        "experiment": "kernel",
        "suite": config.suite,
        "implementations": list(config.implementations or ()),
        "repeats": config.repeats,
        "memory_gb": config.memory_gb,
        "seed": config.seed,
        "cases": records,
        "compilations": compilations.compiled,
        "compilations_from_cache": compilations.from_cache,
        "compile_seconds": round(compilations.seconds, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "max_rss_bytes": max_rss_bytes(),
        "environment": describe_environment(),
    }
    folder.write_summary(summary)
    report.print_folder(folder.path)
    return summary


def measure_case(case: AttentionCase, config: KernelConfig) -> dict[str, Any]:
    """Times and checks every implementation on one case; returns its record.

    An implementation that is left out is in `skipped` with the reason. `plan` is None when nothing
    was run.
    """
    wanted: tuple[Implementation, ...] = config.implementations or runnable_implementations()
    skipped = skip_reasons(case, wanted, config.memory_gb)
    names: tuple[Implementation, ...] = tuple(name for name in wanted if name not in skipped)
    record: dict[str, Any] = {
        "case": case.name,
        **dataclasses.asdict(case),
        "batch": case.batch,
        "plan": None,
        "implementations": [],
        "skipped": [{"implementation": name, "reason": why} for name, why in skipped.items()],
    }
    if names:
        operands = make_operands(case, config.seed)
        record |= _describe(operands)
        record |= _measure(operands, names, config)
    return record


def _describe(operands: CaseOperands) -> dict[str, Any]:
    per_token = bytes_per_token(operands.case)
    return {
        "plan": dataclasses.asdict(operands.summary),
        "tokens_attended": sum(operands.row_lengths),
        "flops": operands.flops,
        "distinct_kv_bytes": operands.distinct_tokens * per_token,
        "unshared_kv_bytes": sum(operands.row_lengths) * per_token,
    }


def _measure(
    operands: CaseOperands, names: tuple[Implementation, ...], config: KernelConfig
) -> dict[str, Any]:
    case = operands.case
    sides = make_sides(operands, names)
    checker = Checker.of(operands)
    size = timing.matmul_size(operands.flops)
    floors = {
        _MATMUL: timing.matmul(size, case.dtype, seed=config.seed),
        _READ: timing.memory_read(),
    }
    timings, outputs = timing.time_in_turns({**sides, **floors}, config.repeats, seed=config.seed)

    product_flops = 2 * size**3
    # A product of exactly as many operations, at the rate of the one that was timed.
    product = timings[_MATMUL].median * operands.flops / product_flops
    paged = timings["paged"].median if "paged" in timings else None
    distinct = operands.distinct_tokens * bytes_per_token(case)
    return {
        "implementations": [
            {
                "implementation": name,
                "milliseconds": _milliseconds(timings[name]),
                "times_matmul": _rounded(timings[name].median / product),
                "speedup_over_paged": _rounded(paged / timings[name].median) if paged else None,
                "gflops_per_second": _rounded(operands.flops / timings[name].median / 1e6),
                "distinct_kv_gb_per_second": _rounded(distinct / timings[name].median / 1e6),
                "max_error": checker.max_error(outputs[name], case.num_kv_heads),
            }
            for name in names
        ],
        "matmul": {
            "size": size,
            "milliseconds": _milliseconds(timings[_MATMUL]),
            "same_flops_milliseconds": _rounded(product),
            "gflops_per_second": _rounded(product_flops / timings[_MATMUL].median / 1e6),
        },
        "memory_read": {
            "bytes": timing.READ_BYTES,
            "milliseconds": _milliseconds(timings[_READ]),
            "gb_per_second": _rounded(timing.READ_BYTES / timings[_READ].median / 1e6),
        },
        "checked": {"rows": checker.rows, "kv_heads": checker.kv_heads},
    }


def _milliseconds(taken: timing.Timing) -> dict[str, float]:
    return {name: _rounded(value) for name, value in dataclasses.asdict(taken).items()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
