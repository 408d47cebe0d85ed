"""The run: part after part; when one breaks, the next runs all the same."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from experiments.gpu.bench import Bench, device_for
from experiments.gpu.budget import Budget
from experiments.gpu.config import GpuConfig
from experiments.gpu.goals import evaluate
from experiments.gpu.record import ERROR, SKIPPED, Record
from experiments.gpu.report import print_record
from experiments.harness.environment import describe_environment, max_rss_bytes
from experiments.harness.errors import CheckFailed
from experiments.harness.results import ResultFolder
from experiments.harness.units import tell_taken_over
from experiments.harness.views import finish


def run_parts(config: GpuConfig, folder: ResultFolder) -> dict[str, Any]:
    """Runs the parts, prints every record, writes the summary and returns it.

    Raises:
      CheckFailed: at the end, when a check of correctness failed or a part broke.
    """
    marks = {} if config.mode == "measure" else {config.mode.replace("-", "_"): True}
    record = Record(folder, marks, print_record)
    budget = Budget(60 * config.minutes, config.part)
    bench = Bench(config.mode, record, budget, folder, config.seed)
    seconds = {}
    with device_for(config.mode):
        folder.begin(describe_environment())
        tell_taken_over(folder, dict.fromkeys(config.part))
        for part in config.part:
            record.part = part
            budget.enter(part)
            if part in folder.finished:
                record.take_over(folder.lines_of(part))
                bench.facts |= folder.finished[part]["facts"]
            else:
                started = time.perf_counter()
                _run_part(bench, part)
                taken = round(time.perf_counter() - started, 2)
                done = {"kind": "part", "part": part, "seconds": taken, "facts": bench.facts}
                folder.finish_unit(part, done)
            seconds[part] = folder.finished[part]["seconds"]
        summary = _summary(config, bench, seconds)
    finish(folder, summary)
    if summary["failures"]:
        raise CheckFailed(
            f"{len(summary['failures'])} failures, the first: {summary['failures'][0]}; "
            f"see {folder.results_path}",
            summary,
        )
    return summary


def _run_part(bench: Bench, part: str) -> None:
    if bench.runs and (reason := bench.budget.lacks(1)):
        bench.record.skipped("all", "all", reason)
        return
    try:
        _function(part)(bench)
    except KeyboardInterrupt:
        raise
    except ImportError as error:
        bench.record.skipped("all", "all", f"it cannot be imported here: {error}")
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()[-12:]
        bench.record.failed("all", "all", error, broke=True, traceback=last)
    finally:
        bench.compiled.clear()  # they hold memory of the device


def _function(part: str) -> Callable[[Bench], None]:
    """A part's code, imported when its turn comes: not all need the same packages."""
    if part in ("paper", "trees", "hydragen", "tune"):
        from experiments.gpu import grid

        return lambda bench: grid.run(bench, part)
    if part == "target":
        from experiments.gpu import device as module
    elif part == "correctness":
        from experiments.gpu import correctness as module
    elif part == "tokens":
        from experiments.gpu import tokens as module
    elif part == "command-buffers":
        from experiments.gpu import command_buffers as module
    elif part == "floors":
        from experiments.gpu import floors as module
    elif part == "decode":
        from experiments.gpu import decode as module
    else:
        raise AssertionError(part)
    return module.run


def _summary(config: GpuConfig, bench: Bench, seconds: dict[str, float]) -> dict[str, Any]:
    from experiments.gpu.device import driver

    records = bench.record.records
    return {
        "experiment": "gpu",
        "mode": config.mode,
        "parts": list(config.part),
        "minutes": config.minutes,
        "seed": config.seed,
        "seconds": seconds,
        "counts": bench.record.counts(),
        "failures": failures(records),
        "errors": [_brief(r) for r in records if r["status"] == ERROR],
        "skipped": [_brief(r) for r in records if r["status"] == SKIPPED],
        "goals": evaluate(records) if config.mode == "measure" else [],
        "facts": bench.facts,
        "driver": driver(),
        "max_rss_bytes": max_rss_bytes(),
        "environment": describe_environment(),
        "folder": str(bench.folder.path),
    }


def failures(records: list[dict[str, Any]]) -> list[str]:
    """What makes the run a failure: a wrong result, a broken part, a program that does not compile
    where that was all there was to do."""
    return [
        _brief(record)
        for record in records
        if record.get("passed") is False
        or record.get("broke")
        or (record["status"] == ERROR and record.get("compile_only"))
    ]


def _brief(record: dict[str, Any]) -> str:
    said = record.get("message") or f"{record.get('value')} {record.get('unit')}"
    return f"{record['part']} {record['case']} {record['side']}: {said}"
