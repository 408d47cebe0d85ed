"""What `layers` shows of a result: how much each layer minds, and what a few that do not choose
change."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import bar_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of


def tables(result: Result) -> list[ResultTable]:
    """The layers, those first that mind most, and both models."""
    alone, together = result.of_kind("layer"), result.of_kind("together")
    ordered = sorted(alone, key=lambda one: -one["divergence"])
    total = sum(one["divergence"] for one in alone)
    rows, before = [], 0.0
    for one in ordered:
        before += one["divergence"]
        share = f"{before / total:.0%}" if total else ""
        rows.append((str(one["layer"]), f"{one['divergence']:.1e}", share))
    config = result.config
    notes = [
        f"KL of the next token's distribution from that of a model that reads everything, in nats, "
        f"over {config['window'] * config['windows']:,} tokens behind {config['prefix']:,}."
    ]
    for one in together:
        which = ", ".join(map(str, one["dense_layers"]))
        what = f"layers {which} read everything" if which else "all layers choose"
        notes.append(f"Where {what}: {one['divergence']:.1e}.")
    columns = Column("layer that chooses alone"), Column("KL"), Column("of all layers', so far")
    return [table_of(f"{config['model']}, {config['select']}", columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """The divergence of each layer that chooses alone."""
    alone = result.of_kind("layer")
    figure = make_figure(7.0, 3.4)
    axes = figure.subplots()
    axes.bar([one["layer"] for one in alone], [one["divergence"] for one in alone], **bar_style(0))
    plain_axes(
        axes,
        f"{result.config['model']}: one layer reads a share ({result.config['select']})",
        "layer",
        "KL of the next token",
    )
    return {"layers": figure}
