"""What `engine` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.engine.config import DETERMINISTIC, ON_A_MESH, SIDES
from experiments.harness.plotting import bar_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of


def tables(result: Result) -> list[ResultTable]:
    """Tokens per second of all sides, and the ratio of engine and loop."""
    summary = result.summary or {}
    title = (
        f"{summary['rows']} rows of {summary['model']}, {summary['shared_tokens']:,} shared "
        f"tokens, {summary['steps_per_call']} steps a call, median of {summary['rounds']}"
    )
    columns = [
        Column("", numeric=False),
        Column("tokens/s", timed=True),
        Column("host work", timed=True),
    ]
    host = f"{summary['host_microseconds_per_token']:.1f} us a token"
    rows = [
        ("bare loop", f"{summary['bare_tokens_per_second']:,.1f}", ""),
        ("engine", f"{summary['engine_tokens_per_second']:,.1f}", host),
    ]
    low, high = summary["ratio_range"]
    if "deterministic_ratio" in summary:
        rows.append((DETERMINISTIC, f"{summary['deterministic_tokens_per_second']:,.1f}", ""))
    if "mesh_ratio" in summary:
        rows.append((ON_A_MESH, f"{summary['mesh_tokens_per_second']:,.1f}", ""))
    note = f"the engine reaches {summary['ratio']:.1%} of the bare loop ({low:.1%} to {high:.1%})"
    notes = [note]
    if "mesh_ratio" in summary:
        notes.append(f"on a mesh of one device it reaches {summary['mesh_ratio']:.1%} of itself")
    return [table_of(title, columns, rows, timed_notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """Each round's rates, side by side."""
    rounds = result.of_kind("round")
    figure = make_figure(6.0, 3.6)
    axes = figure.subplots()
    sides = [side for side in SIDES if side in rounds[0]]
    width = 0.8 / len(sides)
    for index, side in enumerate(sides):
        places = [one["round"] + (index - (len(sides) - 1) / 2) * width for one in rounds]
        rates = [one[side]["rate"] for one in rounds]
        axes.bar(places, rates, width=width, label=side, **bar_style(index))
    plain_axes(axes, "Decoding, the engine and the bare loop", "round", "tokens per second")
    axes.set_xticks([one["round"] for one in rounds])
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(sides),
        frameon=False,
    )
    return {"picture": figure}
