"""What `gradients` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.gradients.config import SIDES
from experiments.harness.plotting import LIMIT, from_zero, line_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of


def _title(result: Result) -> str:
    config = result.config
    return f"Gradients of {config['model']} for answers of {config['tokens']} tokens"


def tables(result: Result) -> list[ResultTable]:
    """Both sides, for each prompt and group."""
    columns = (
        Column("prompt"),
        Column("answers"),
        Column("tokens computed"),
        Column("without sharing"),
        *(Column(f"{side}, seconds", timed=True) for side in SIDES),
        Column("times as fast", timed=True),
        *(Column(f"{side}, memory") for side in SIDES),
        Column("gradients differ by"),
    )
    rows = [
        (
            f"{one['prompt']:,}",
            str(one["group"]),
            f"{one['computed']:,}",
            f"{one['of']:,}",
            *(f"{one['seconds'][side]:.2f}" for side in SIDES),
            f"{one['speedup']:.1f}",
            *(format_bytes(one["temporary_bytes"][side]) for side in SIDES),
            f"{one['gradient_difference']:.1e}",
        )
        for one in result.of_kind("point")
    ]
    notes = [
        *(f"{side}: {meaning}." for side, meaning in SIDES.items()),
        "Forward and backward, medians. Memory: what XLA allocates beside weights and gradients. "
        "Gradients differ by: the largest, of all weights, of the difference's norm to that of the "
        "padded side's gradient.",
    ]
    return [table_of(_title(result), columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """How many times as fast the tree is, by answers of a prompt."""
    points = result.of_kind("point")
    if not points:
        return {}
    figure = make_figure(6.0, 3.6)
    axes = figure.subplots()
    for index, prompt in enumerate(dict.fromkeys(one["prompt"] for one in points)):
        some = [one for one in points if one["prompt"] == prompt]
        label = f"prompt of {prompt:,} tokens"
        groups, speedups = ([one[name] for one in some] for name in ("group", "speedup"))
        axes.plot(groups, speedups, label=label, **line_style(index))
    axes.axhline(1, **LIMIT)
    from_zero(axes, (one["speedup"] for one in points), room=1.1)
    axes.legend(loc="best", frameon=False)
    plain_axes(axes, _title(result), "answers to one prompt", "times as fast as padded")
    return {"picture": figure}
