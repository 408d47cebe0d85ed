"""What `load` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.percentiles import NAMES
from experiments.harness.plotting import COLOURS, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of


def tables(result: Result) -> list[ResultTable]:
    """How each side answers."""
    summary = result.summary or {}
    columns = (
        Column("", numeric=False),
        Column("tokens a second", timed=True),
        Column("ms to first token: p50, p90, p99", timed=True),
        Column("ms a token behind it", timed=True),
        Column("prompt tokens cached"),
    )
    rows = []
    for name, side in summary["sides"].items():
        cached = side["cached"]
        rows.append(
            (
                name,
                f"{side['tokens_per_second']:,.0f}",
                _milliseconds(side["first_token"]),
                _milliseconds(side["per_token"]),
                "not told" if cached is None else f"{100 * cached:.1f}%",
            )
        )
    how = (
        f"{summary['at_once']} at once"
        if summary["rate"] is None
        else f"{summary['rate']} a second"
    )
    title = (
        f"{summary['sessions']} conversations of {summary['turns']} turns, {how}, behind "
        f"{summary['shared_tokens']:,} shared tokens"
    )
    notes = [f"medians of {summary['rounds']} rounds."]
    if summary["overhead"] is not None:
        notes.append(
            f"The endpoint, with its clients on the same cores, costs {summary['overhead']:.1%} of "
            "the engine's tokens a second."
        )
    if summary["errors"]:
        notes.append(f"{summary['errors']} requests had no answer.")
    return [table_of(title, columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """Tokens a second of each side."""
    summary = result.summary or {}
    figure = make_figure(5.0, 2.2)
    axes = figure.subplots()
    names = [*summary["sides"]][::-1]
    speeds = [summary["sides"][name]["tokens_per_second"] for name in names]
    axes.barh(names, speeds, color=COLOURS[0])
    plain_axes(axes, "Answers under load", "tokens a second", "")
    return {"picture": figure}


def _milliseconds(found: dict[str, float] | None) -> str:
    return "none" if found is None else ", ".join(f"{1e3 * found[name]:.1f}" for name in NAMES)
