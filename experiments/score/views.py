"""What `score` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import COLOURS, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of
from experiments.score.config import WAYS


def tables(result: Result) -> list[ResultTable]:
    """What each way takes."""
    summary = result.summary or {}
    columns = (
        Column("scored", numeric=False),
        Column("tokens computed"),
        Column("seconds", timed=True),
        Column("of alone", timed=True),
    )
    alone = summary["ways"]["alone"]["seconds"]
    rows = [
        (
            WAYS[name],
            f"{way['computed']:,}",
            f"{way['seconds']:.3f}",
            f"{way['seconds'] / alone:.2f}",
        )
        for name, way in summary["ways"].items()
    ]
    title = (
        f"{summary['continuations']} continuations of {summary['tokens']} tokens behind "
        f"{summary['prefix']:,}"
    )
    notes = [
        "medians. The log-probabilities, computed cold and from the cache, differ by at most "
        f"{summary['largest_difference']:.1e}."
    ]
    return [table_of(title, columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """Seconds of each way."""
    summary = result.summary or {}
    figure = make_figure(6.0, 2.8)
    axes = figure.subplots()
    names = [*summary["ways"]][::-1]
    axes.barh(names, [summary["ways"][name]["seconds"] for name in names], color=COLOURS[0])
    plain_axes(axes, "Scoring continuations of one prefix", "seconds", "")
    return {"picture": figure}
