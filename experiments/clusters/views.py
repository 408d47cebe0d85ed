"""What `clusters` shows of a result: what is saved, and what the model loses by it."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.clusters.measures import ClusterMeasures, cluster_measures
from experiments.harness.plotting import from_zero, line_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of

_PAPER = (
    "The paper has 21.4% less KV cache and up to 3.2% less accuracy, on LLaMA-7B and 33B and "
    "OPT-66B (arXiv 2403.08058, abstract)."
)


def tables(result: Result) -> list[ResultTable]:
    """The counts, and what each of them does with each membership."""
    config, cells = result.config, cluster_measures(result.of_kind("clusters"))
    counts = result.of_kind("counts")[0]["counts"]
    columns = (
        Column("clusters", numeric=False),
        Column("who attends", numeric=False),
        Column("of all layers"),
        Column("keys of a token"),
        Column("with values"),
        Column("saved"),
        Column("KL"),
        Column("perplexity"),
        Column("change, %"),
        Column("a step's time", timed=True),
    )
    rows = [_row(one, cells[0]) for one in cells]
    text = "Python's help" if config["text"] is None else config["text"]
    notes = [
        *(f"{name}: {' '.join(map(str, of))} by layer." for name, of in counts.items()),
        f"Scored: {config['window'] * config['windows'] * config['passages']:,} tokens of {text}, "
        f"behind {config['prefix']} each. KL of the next token's distribution from that of all "
        "heads, in nats; change of the perplexity, ± one standard error. A step: decoding "
        f"{config['windows']} rows, the whole model, over the time where all heads attend.",
        _PAPER,
    ]
    return [table_of(f"{config['model']}: clusters of heads", columns, rows, notes=notes)]


def _row(one: ClusterMeasures, whole: ClusterMeasures) -> tuple[str, ...]:
    first = one is whole
    change = f"{100 * one.perplexity_change:+.1f}±{100 * one.standard_error:.1f}"
    return (
        one.counted,
        one.membership or "",
        str(one.clusters),
        format_bytes(one.key_bytes),
        format_bytes(one.kv_bytes),
        "" if first else f"{1 - one.kv_bytes / whole.kv_bytes:.0%}",
        "" if first else f"{one.divergence:.1e}",
        f"{one.perplexity:.3f}",
        "" if first else change,
        f"{one.decode_time:.2f}",
    )


def figures(result: Result) -> dict[str, Figure]:
    """The divergence over the bytes that are saved."""
    whole, *cells = cluster_measures(result.of_kind("clusters"))
    figure = make_figure(6.5, 4.0)
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(one.membership for one in cells)):
        line = sorted(
            (one for one in cells if one.membership == name), key=lambda one: one.clusters
        )
        saved = [100 * (1 - one.kv_bytes / whole.kv_bytes) for one in line]
        style = line_style(index)
        if name == "random":  # several draws of each count
            style["linestyle"] = "none"
        axes.plot(saved, [one.divergence for one in line], label=name, **style)
    from_zero(axes, (one.divergence for one in cells), room=1.1)
    axes.legend(loc="best", frameon=False)
    title = f"{result.config['model']}: clusters of heads"
    plain_axes(axes, title, "KV cache saved (%)", "KL of the next token (nats)")
    return {"clusters": figure}
