"""What `heads` shows of a result: what each share of each pattern costs, and what it keeps."""

from __future__ import annotations

from statistics import mean

from matplotlib.figure import Figure

from experiments.harness.plotting import from_zero, line_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of
from experiments.heads.measures import HeadMeasures, head_measures
from experiments.quality.config import DEPTHS, SHOWN, STRING


def tables(result: Result) -> list[ResultTable]:
    """The gates as they were learned, and the shares of all patterns."""
    gates, cells = result.of_kind("gates"), head_measures(result.of_kind("heads"))
    found = []
    if gates:
        columns = (Column("step"), Column("distance"), Column("mean gate"))
        rows = [
            (f"{one['step']:,}", f"{one['distance']:.1e}", f"{one['mean_gate']:.3f}")
            for one in gates
        ]
        note = (
            "Distance: mean squared difference of the last hidden states from those of all heads, "
            "mean over the steps since the row before."
        )
        found.append(table_of(f"{result.config['model']}: gates", columns, rows, notes=[note]))
    if cells:
        found.append(_shares(result, cells))
    return found


def _shares(result: Result, cells: list[HeadMeasures]) -> ResultTable:
    config = result.config
    lengths = [str(length) for length in config["copy_lengths"]]
    longest = lengths[-1]
    columns = (
        Column("heads chosen by", numeric=False),
        Column("keep all"),
        Column(f"bytes at {longest}"),
        Column("KL"),
        Column("perplexity"),
        Column("change, %"),
        *(Column(f"copied, {length}") for length in lengths),
    )
    rows = [
        (
            one.pattern,
            f"{one.share:.0%}",
            format_bytes(one.kept_bytes[longest]),
            "" if one is cells[0] else f"{one.divergence:.1e}",
            f"{one.perplexity:.3f}",
            ""
            if one is cells[0]
            else f"{100 * one.perplexity_change:+.2f}±{100 * one.standard_error:.2f}",
            *(
                "/".join(f"{100 * share:.0f}" for share in one.copied[name])
                + f" ({100 * mean(one.copied[name]):.0f})"
                for name in lengths
            ),
        )
        for one in cells
    ]
    depths = "/".join(f"{depth}%" for depth in DEPTHS)
    text = "Python's help" if config["text"] is None else config["text"]
    notes = [
        f"Heads that do not keep all see the first {config['sinks']} tokens and the last "
        f"{config['recent']}. Bytes: of {config['dtype']} keys and values that the heads of such a "
        "sequence would have to keep; the pool keeps all. "
        f"Scored: {config['window'] * config['windows']:,} tokens of {text}, in windows of "
        f"{config['window']} behind {config['prefix']:,}. KL of the next token's distribution from "
        "that of all heads, in nats; change of the perplexity, ± one standard error.",
        f"Copied: of {config['copy_strings']} strings of {STRING} random tokens, hidden at "
        f"{depths} of a text of that many tokens, those found again behind their first {SHOWN}, "
        "in %, and their mean.",
    ]
    title = f"{config['model']}: retrieval and streaming heads"
    return table_of(title, columns, rows, notes=notes)


def figures(result: Result) -> dict[str, Figure]:
    """What is copied from the longest text, by the share of heads that keep all."""
    cells = head_measures(result.of_kind("heads"))
    if len(cells) < 2:
        return {}
    longest = str(result.config["copy_lengths"][-1])
    drawn = make_figure(6.5, 4.0)
    axes = drawn.subplots()
    whole = cells[0]
    for index, name in enumerate(dict.fromkeys(one.pattern for one in cells[1:])):
        line = [whole, *(one for one in cells if one.pattern == name)]
        copied = [100 * mean(one.copied[longest]) for one in line]
        axes.plot([100 * one.share for one in line], copied, label=name, **line_style(index))
    from_zero(axes, (100 * mean(one.copied[longest]) for one in cells), room=1.1)
    axes.legend(loc="best", frameon=False)
    plain_axes(
        axes,
        f"{result.config['model']}: what is found again of {int(longest):,} tokens",
        "KV heads that keep all tokens (%)",
        "tokens copied (%)",
    )
    return {"heads": drawn}
