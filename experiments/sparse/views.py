"""What `sparse` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, table_of

_PHASES = {"decode": "a decode step", "prefill": "a prefill call"}


def tables(result: Result) -> list[ResultTable]:
    """Time and chunks read by context and by what is read."""
    summary = result.summary or {}
    columns = [Column("context"), Column("reads", numeric=False)]
    for phase in _PHASES:
        columns += [
            Column(f"{phase}, ms", timed=True),
            Column("of all", timed=True),
            Column("chunks read"),
        ]
    counted = "products" in summary["contexts"][0]["sides"][0]
    if counted:
        columns.append(Column("products, of all"))
    return [
        table_of(
            f"Attention of {summary['rows']} rows behind one prefix, and of a prefill call of "
            f"{summary['prefill_tokens']} tokens at its end; {summary.get('layers', 1)} layers, "
            f"heads {summary['heads']} of {summary['head_dim']}",
            columns,
            [
                _row(context, side, counted=counted)
                for context in summary["contexts"]
                for side in context["sides"]
            ],
            notes=[
                "Products: of a query of the prefill call with keys and values, and with what it "
                "chooses by."
            ]
            if counted
            else (),
        )
    ]


def figures(result: Result) -> dict[str, Figure]:
    """Time by context, a line for each window and choice: flat where it reads no more."""
    summary = result.summary or {}
    figure = make_figure(8.0, 3.6)
    contexts = [context["tokens"] for context in summary["contexts"]]
    names = [_name(side) for side in summary["contexts"][0]["sides"]]
    for place, (phase, title) in enumerate(_PHASES.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        for index, name in enumerate(names):
            times = [context["sides"][index][phase]["median"] for context in summary["contexts"]]
            axes.plot(contexts, times, label=name, **line_style(index))
        plain_axes(axes, f"Attention of {title}", "tokens of the prefix", "milliseconds, median")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{tokens:,}" for tokens in contexts])
        axes.set_ylim(bottom=0)
        if place == 1:
            axes.legend(frameon=False, loc="upper left")
    return {"picture": figure}


def _name(side: Record) -> str:
    """What is read, in words."""
    if "select" in side:
        policy, _, share = side["select"].partition(":")
        return f"{policy}, {float(share):.0%}"
    return "all tokens" if side["window"] is None else f"the last {side['window']:,}"


def _row(context: Record, side: Record, *, counted: bool) -> tuple[str, ...]:
    full = context["sides"][0]
    cells = [f"{context['tokens']:,}", _name(side)]
    for phase in _PHASES:
        taken = side[phase]
        cells += [
            f"{taken['median']:.2f}",
            f"{taken['median'] / full[phase]['median']:.0%}",
            "" if taken["chunk_reads"] is None else f"{taken['chunk_reads']:,}",
        ]
    if counted:
        cells.append(f"{side['products'] / full['products']:.1%}")
    return tuple(cells)
