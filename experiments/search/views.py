"""What `search` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import COLOURS, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of


def tables(result: Result) -> list[ResultTable]:
    """Every branch, the best answer last, and what sharing saved."""
    summary = result.summary or {}
    columns = [Column("depth"), Column("mean log-probability"), Column("answer", numeric=False)]
    rows = [
        (str(branch["depth"]), f"{branch['score']:.3f}", " ".join(branch["text"].split()))
        for branch in result.of_kind("branch")
    ]
    best = f"best answer ({summary['score']:.3f}): {' '.join(summary['answer'].split())}"
    sharing = (
        f"{summary['branches']} branches, {summary['forked']} of them forked; KV cache held "
        f"{format_bytes(summary['kv_bytes_held'])}, without sharing "
        f"{format_bytes(summary['kv_bytes_unshared'])}"
    )
    return [table_of(f"Branches: {summary['question']}", columns, rows, notes=[best, sharing])]


def figures(result: Result) -> dict[str, Figure]:
    """How likely the branches of each depth are."""
    branches = result.of_kind("branch")
    figure = make_figure(6.0, 3.6)
    axes = figure.subplots()
    depths, scores = zip(*((one["depth"], one["score"]) for one in branches), strict=True)
    axes.scatter(depths, scores, color=COLOURS[0], marker="o")
    plain_axes(axes, "Branches of the search", "depth", "mean log-probability of the answer")
    axes.set_xticks(sorted(set(depths)))
    return {"picture": figure}
