"""What `soak` prints for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.report import format_bytes
from experiments.soaking.checks import MEMORY_GROWTH


def print_soak(console: Console, summary: dict[str, Any]) -> None:
    """What was done, and what of it must hold."""
    title = f"{summary['seconds']:.0f} s of random work"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    ended = ", ".join(f"{count:,} by {reason}" for reason, count in summary["ended"].items())
    table.add_row("requests", f"{summary['requests']:,}: {ended}")
    table.add_row(
        "tokens decoded",
        f"{summary['decode_tokens']:,}, {summary['decode_tokens_per_second']:,.0f} a second",
    )
    table.add_row(
        "prompt tokens computed, found",
        f"{summary['prefill_tokens']:,}, {summary['prompt_tokens_hit']:,}",
    )
    for name in ("preemptions", "evictions", "forks"):
        table.add_row(name, f"{summary[name]:,}")
    table.add_row("greedy answers computed again", f"{summary['rechecked']['requests']:,}")
    if summary["memory_growth"] is not None:
        table.add_row(
            "resident memory",
            f"{format_bytes(summary['resident_bytes'])}, "
            f"{summary['memory_growth']:+.2%} from first to last quarter",
        )
    console.print(table)
    if summary["memory_growth"] is None:
        console.print("resident memory was not checked: too few measurements, or none here")
    for failure in summary["failures"]:
        console.print(Text(f"FAILED: {failure}", style="bold red"))
    if not summary["failures"]:
        console.print(
            f"All held: memory flat within {MEMORY_GROWTH:.0%}, nothing compiled after the "
            "warm-up, no request lost, answers as of a fresh engine, all chunks back.",
            highlight=False,
        )
