"""What `tiers` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import COLOURS, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of
from experiments.tiers.config import WAYS


def tables(result: Result) -> list[ResultTable]:
    """Milliseconds to the first token, by where the prompt's beginning is."""
    summary = result.summary or {}
    columns = (
        Column("tokens"),
        Column("MB"),
        *(Column(way, timed=True) for way in WAYS),
        Column("computed / disk", timed=True),
    )
    rows = [
        (
            f"{one['length']:,}",
            f"{one['bytes'] / 1e6:.1f}",
            *(f"{1e3 * one['seconds'][way]:.1f}" for way in WAYS),
            f"{one['seconds']['computed'] / one['seconds']['disk']:.1f}",
        )
        for one in summary["lengths"]
    ]
    title = (
        f"Milliseconds to the first token of a prompt with {summary['tokens']} tokens of its own"
    )
    notes = [f"{way}: {meaning}." for way, meaning in WAYS.items()]
    return [table_of(title, columns, rows, notes=["medians.", *notes])]


def figures(result: Result) -> dict[str, Figure]:
    """The same, by the tokens that the prompt begins with."""
    summary = result.summary or {}
    figure = make_figure(6.0, 3.6)
    axes = figure.subplots()
    lengths = [one["length"] for one in summary["lengths"]]
    shown = [way for way in WAYS if way != "kept"]
    for colour, way in zip(COLOURS, shown, strict=False):
        times = [1e3 * one["seconds"][way] for one in summary["lengths"]]
        axes.plot(lengths, times, marker="o", label=way, color=colour)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.legend()
    plain_axes(axes, "Where a prompt's beginning is", "tokens it begins with", "ms to first token")
    return {"picture": figure}
