"""What `soak` shows of a result."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of
from experiments.soak.checks import MEMORY_GROWTH
from experiments.soak.figure import soak_figure


def tables(result: Result) -> list[ResultTable]:
    """What was done, and what of it must hold."""
    summary = result.summary or {}
    ended = ", ".join(f"{count:,} by {reason}" for reason, count in summary["ended"].items())
    rate = f"{summary['decode_tokens_per_second']:,.0f}"
    rows = [
        ("requests", f"{summary['requests']:,}: {ended}"),
        ("tokens decoded", f"{summary['decode_tokens']:,}, {rate} a second"),
        (
            "prompt tokens computed, found",
            f"{summary['prefill_tokens']:,}, {summary['prompt_tokens_hit']:,}",
        ),
        *((name, f"{summary[name]:,}") for name in ("preemptions", "evictions", "forks")),
        ("weights replaced", f"{summary.get('new_weights', 0):,} times"),
        (
            "greedy answers computed again, ties",
            f"{summary['rechecked']['requests']:,}, {summary['rechecked']['ties']:,}",
        ),
    ]
    if summary["memory_growth"] is not None:
        growth = f"{summary['memory_growth']:+.2%} from first to last quarter"
        rows.append(("resident memory", f"{format_bytes(summary['resident_bytes'])}, {growth}"))
    # How much work comes depends on how fast it is done.
    columns = [Column("", numeric=False), Column("", timed=True)]
    title = f"{summary['seconds']:.0f} s of random work"
    return [table_of(title, columns, rows, notes=_notes(summary))]


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = [f"FAILED: {failure}" for failure in summary["failures"]]
    held = [
        "nothing compiled after the warm-up",
        "no request lost",
        "answers as of a fresh engine",
        "all chunks back",
    ]
    if summary["memory_growth"] is None:
        notes.append("resident memory was not checked: too few measurements, or none here")
    else:
        held.insert(0, f"memory flat within {MEMORY_GROWTH:.0%}")
    if not summary["failures"]:
        notes.append(f"All held: {', '.join(held)}.")
    return notes


def figures(result: Result) -> dict[str, Figure]:
    """Throughput, requests, chunks and memory over time; none of a run of no interval."""
    intervals = result.of_kind("interval")
    return {"picture": soak_figure(intervals, result.summary or {})} if intervals else {}
