"""The kernel experiment itself: cases one after another, timed, checked and recorded."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

from experiments.baselines import matrix_products
from experiments.harness import timing
from experiments.harness.compilations import compilation_cache, count_compilations
from experiments.harness.environment import describe_environment, max_rss_bytes, package_version
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.kernel.cases import SizedCase, scaling_note, suite_cases
from experiments.kernel.coded import coded_bytes
from experiments.kernel.config import CODED, Implementation, KernelConfig
from experiments.kernel.operands import CaseOperands, Checker, bytes_per_token, make_operands
from experiments.kernel.sides import make_sides
from experiments.kernel.skips import runnable_implementations, skip_reasons
from experiments.kernel.summary import ours_of, summarise

_MATMUL, _READ = "matrix product", "memory read"  # what a floor is bound by
_LEAST_PRODUCT = 1024  # of a floor: smaller ones do not show what the machine can do


@compilation_cache()
def measure(config: KernelConfig, folder: ResultFolder) -> dict[str, Any]:
    """Measure every case of the suite; returns the summary, JSON values only."""
    started = time.perf_counter()
    wanted: tuple[Implementation, ...] = config.implementations or runnable_implementations()
    environment = describe_environment() | {"torch": package_version("torch")}
    ours, scaling = ours_of(wanted), scaling_note(config.divisor)
    units = {
        sized.full.name: functools.partial(measure_case, sized, config, wanted)
        for sized in suite_cases(config)
    }
    folder.begin(environment, ours=ours, scaling=scaling)
    with count_compilations() as compilations:
        records = measure_units(folder, units, "cases")
    summary = {
        "experiment": "kernel",
        "suite": config.suite,
        "scale": config.divisor,
        "scaling": scaling,
        "dtype": config.dtype,
        "implementations": list(wanted),
        "repeats": config.repeats,
        "memory_gb": config.memory_gb,
        "seed": config.seed,
        "cases": len(records),
        "ours": ours,
        "sides": summarise(records, ours),
        "compilations": compilations.compiled,
        "compilations_from_cache": compilations.from_cache,
        "compile_seconds": round(compilations.seconds, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "max_rss_bytes": max_rss_bytes(),
        "environment": environment,
    }
    return finish(folder, summary)


def measure_case(
    sized: SizedCase, config: KernelConfig, wanted: tuple[Implementation, ...]
) -> dict[str, Any]:
    """Times and checks every implementation on one case; returns its record.

    An implementation that is left out is in `skipped` with the reason. `plan` is None when nothing
    was run.
    """
    case = sized.case
    skipped = skip_reasons(case, wanted, config.memory_gb)
    names: tuple[Implementation, ...] = tuple(name for name in wanted if name not in skipped)
    record: dict[str, Any] = {
        "kind": "case",
        "case": case.name,
        **dataclasses.asdict(case),
        "batch": case.batch,
        "full_tree": sized.full.tree,
        "divided_by": config.divisor,
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
    size = max(timing.matmul_size(operands.flops), _LEAST_PRODUCT)
    products = matrix_products(size, case.dtype, seed=config.seed)
    reads = timing.memory_reads()
    calls = {**sides, **products, **reads}
    timings, outputs = timing.time_in_turns(calls, config.repeats, seed=config.seed)
    by, way = (
        timing.fastest({name: timings[name] for name in floor}) for floor in (products, reads)
    )

    # In milliseconds: a product of exactly as many operations, at the rate of the fastest that was
    # timed, and each distinct key and value read once, at that of the fastest read.
    distinct = operands.distinct_tokens * bytes_per_token(case)
    least = {
        name: coded_bytes(operands, CODED[name][1]) if name in CODED else distinct for name in names
    }
    product = timings[by].median * operands.flops / (2 * size**3)
    read = timings[way].median * distinct / timing.READ_BYTES
    floor = max(product, read)
    paged = timings["paged"].median if "paged" in timings else None
    return {
        "implementations": [
            {
                "implementation": name,
                "milliseconds": _milliseconds(timings[name]),
                "speedup_over_paged": _rounded(paged / timings[name].median) if paged else None,
                "gflops_per_second": _rounded(operands.flops / timings[name].median / 1e6),
                "of_matmul": _rounded(product / timings[name].median),
                "distinct_kv_bytes": least[name],
                "distinct_kv_gb_per_second": _rounded(least[name] / timings[name].median / 1e6),
                "of_memory_read": _rounded(read * least[name] / distinct / timings[name].median),
                "of_floor": _rounded(floor / timings[name].median),
                "max_error": checker.max_error(outputs[name], case.num_kv_heads),
            }
            for name in names
        ],
        "matmul": {
            "size": size,
            "by": by,
            "milliseconds": _milliseconds(timings[by]),
            "same_flops_milliseconds": _rounded(product),
            "gflops_per_second": _rounded(2 * size**3 / timings[by].median / 1e6),
        },
        "memory_read": {
            "bytes": timing.READ_BYTES,
            "way": way,
            "milliseconds": _milliseconds(timings[way]),
            "distinct_kv_milliseconds": _rounded(read),
            "gb_per_second": _rounded(timing.READ_BYTES / timings[way].median / 1e6),
        },
        "floor": {
            "milliseconds": _rounded(floor),
            "bound": _MATMUL if product > read else _READ,
        },
        "checked": {"rows": checker.rows, "kv_heads": checker.kv_heads},
    }


def _milliseconds(taken: timing.Timing) -> dict[str, float]:
    return {name: _rounded(value) for name, value in dataclasses.asdict(taken).items()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
