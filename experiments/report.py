"""What `generate` prints for people: the answers, and what sharing did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.decoding import Measured

_NOT_RUN = "not run"


def format_bytes(count: int) -> str:
    """`count` in the largest binary unit that keeps it at one or more: `1.50 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def print_answers(console: Console, questions: Sequence[str], answers: Sequence[str]) -> None:
    """A table with a row for each request."""
    table = Table(title="Answers", show_lines=False, title_justify="left", expand=True)
    table.add_column("#", justify="right", style="dim")
    table.add_column("Question", ratio=2)
    table.add_column("Answer", ratio=3)
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        # Text, not str: brackets in a model's words are not markup.
        table.add_row(str(index), Text(question), Text(" ".join(answer.split())))
    console.print(table)


def print_sharing(console: Console, run: Measured) -> None:
    """What the run computed and held, against what it would have been without sharing."""
    what = "What sharing did" if run.sharing else "Nothing was shared"
    title = f"{what}, {_requests(run)}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("this run", justify="right")
    table.add_column("without sharing", justify="right")
    table.add_column("saved", justify="right")
    table.add_row(
        "prompt tokens computed",
        f"{run.prefill_tokens_computed:,}",
        f"{run.prompt_tokens:,}",
        _saved(run.prefill_tokens_computed, run.prompt_tokens),
    )
    table.add_row(
        "KV cache held",
        format_bytes(run.kv_bytes_held),
        format_bytes(run.kv_bytes_unshared),
        _saved(run.kv_bytes_held, run.kv_bytes_unshared),
    )
    console.print(table)
    console.print(
        f"prompt tokens reused: {run.prefill_tokens_reused:,}; "
        f"longest shared prefix: {run.shared_tokens:,} tokens; plan: {run.plan_decision}",
        markup=False,
        highlight=False,
    )


def print_speed(console: Console, run: Measured, unshared: Measured | None) -> None:
    """Rates of the run, beside those of the run without sharing; each with its batch."""
    table = Table(title="Speed, compilation not counted", title_justify="left")
    table.add_column("")
    table.add_column("this run", justify="right")
    table.add_column("without sharing", justify="right")
    table.add_column("ratio", justify="right")
    table.add_row("requests", str(run.batch), str(unshared.batch) if unshared else _NOT_RUN)
    rows = (
        ("prompt tokens ready / s", "prompt_tokens_per_second"),
        ("prompt tokens computed / s", "prefill_tokens_per_second"),
        ("decode tokens / s", "decode_tokens_per_second"),
    )
    for name, field in rows:
        mine = getattr(run, field)
        other = getattr(unshared, field) if unshared else 0.0
        table.add_row(
            name,
            f"{mine:,.0f}",
            f"{other:,.0f}" if unshared else "",
            f"{mine / other:.2f} x" if other else "",
        )
    console.print(table)
    if unshared is not None and unshared.batch != run.batch:
        console.print(
            f"The two sides have different batches ({run.batch} and {unshared.batch} requests); "
            "--compare-batch chooses the second.",
            highlight=False,
        )


def print_phases(console: Console, seconds: dict[str, float]) -> None:
    """Seconds of each phase on one line."""
    text = ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in seconds.items())
    console.print(f"phases: {text}", highlight=False)


def print_folder(console: Console, folder: Path) -> None:
    # Never wrapped or coloured: it is there to be copied.
    console.print(f"results: {folder}", markup=False, highlight=False, soft_wrap=True)


def _requests(run: Measured) -> str:
    return "1 request" if run.batch == 1 else f"{run.batch} requests"


def _saved(count: int, unshared: int) -> str:
    return f"{1 - count / unshared:.1%}" if unshared else ""
