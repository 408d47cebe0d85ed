"""What `tiers` shows of a result."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.harness.plotting import COLOURS, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, table_of
from experiments.tiers.config import WAYS

PLACES = {"pool": "in the pool", "host": "in memory", "disk": "on the disk"}


def tables(result: Result) -> list[ResultTable]:
    """Milliseconds to the first token, by where the prompt's beginning is."""
    summary = result.summary or {}
    if "replays" in summary:
        return [_of_trace(summary)]
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
    if "replays" in summary:
        return {"picture": _trace_figure(summary["replays"])}
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


def _of_trace(summary: Record) -> ResultTable:
    """Where prompt tokens are found, by what is behind the pool."""
    columns = (
        Column("tokens in memory"),
        Column("on the disk"),
        *(Column(f"found: {words}") for words in PLACES.values()),
        Column("in all"),
    )
    rows = []
    for one in summary["replays"]:
        shares = [one["found"][place] / one["tokens"] for place in PLACES]
        sizes = [f"{one['sizes'][tier]:,}" for tier in ("host", "disk")]
        rows.append((*sizes, *(f"{share:.1%}" for share in (*shares, sum(shares)))))
    pool = summary["replays"][0]["sizes"]["pool"]
    title = f"{summary['requests']:,} requests of {summary['trace']}, a pool of {pool:,} tokens"
    return table_of(title, columns, rows, notes=["of all prompt tokens, in whole blocks of 512."])


def _trace_figure(replays: Sequence[Record]) -> Figure:
    """The same shares, one upon another."""
    figure = make_figure(6.0, 3.2)
    axes = figure.subplots()
    names = [
        " + ".join(["pool", *(tier for tier in ("host", "disk") if one["sizes"][tier])])
        for one in replays
    ]
    below = [0.0] * len(replays)
    for colour, (place, words) in zip(COLOURS, PLACES.items(), strict=False):
        shares = [100 * one["found"][place] / one["tokens"] for one in replays]
        axes.bar(names, shares, bottom=below, color=colour, label=words)
        below = [bottom + share for bottom, share in zip(below, shares, strict=True)]
    axes.legend()
    plain_axes(axes, "Prompt tokens found", "", "% of all")
    return figure
