"""What `quality --codec` and `--select` show: what each codec or choice does to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.plotting import line_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of
from experiments.quality.config import DEPTHS, SHOWN, STRING
from experiments.quality.measures import CodecMeasures, codec_measures
from experiments.select_option import POLICIES, YARDSTICKS

LEAST = 1e-7
"""A divergence below is drawn as this one."""


def table(result: Result) -> ResultTable:
    config, measured = result.config, codec_measures(result.of_kind("codec"))
    exact = measured[0]
    lengths = [str(length) for length in config["copy_lengths"]]
    recalls = any(one.recall is not None for one in measured)
    columns = (
        Column("codec", numeric=False),
        Column("reads", numeric=False),
        Column("bytes"),
        Column("KL"),
        Column("perplexity"),
        Column("change, %"),
        Column("same, %"),
        *([Column("attention, %")] if recalls else []),
        Column("answers, %"),
        *(Column(f"copied, {length}") for length in lengths),
    )
    rows = [
        (
            one.codec,
            one.reads,
            "" if one.bytes_per_token is None else f"{one.bytes_per_token:,.0f}",
            "" if one is exact else f"{one.divergence:.1e}",
            f"{one.perplexity:.3f}",
            ""
            if one is exact
            else f"{100 * one.perplexity_change:+.2f}±{100 * one.standard_error:.2f}",
            f"{100 * one.same_token:.1f}",
            *([_recall_cell(one)] if recalls else []),
            "" if one.answers is None else f"{100 * one.answers:.1f}",
            *(
                "/".join(f"{100 * share:.0f}" for share in one.copied.get(name, ()))
                for name in lengths
            ),
        )
        for one in measured
    ]
    text = "Python's help" if config["text"] is None else config["text"]
    depths = "/".join(f"{depth}%" for depth in DEPTHS)
    notes = [
        f"Scored: {config['window'] * config['windows']:,} tokens of {text}, in windows of "
        f"{config['window']} behind {config['prefix']:,}. KL of the next token's distribution from "
        "that without a codec, in nats, mean; change of the perplexity, ± one standard error; "
        "same: where both find the same token likeliest. Bytes: of a token. Answers: of "
        f"{config['answers'] * config['answer_tokens']:,} tokens that the model itself goes on "
        "with, where the codec has read the same before.",
        f"Copied: of {config['copy_strings']} strings of {STRING} random tokens, hidden at "
        f"{depths} of a text of that many tokens, those found again behind their first {SHOWN}, "
        "in %.",
        "Attention: what of it lies in the chunks that are chosen, the mean and the 5th percentile "
        "over layers that choose, heads and queries.",
        "A token reads chunks before its own encoded, or of those the share that is named, chosen "
        "by the policy before it; as KIVI: keys before the last whole 128, "
        "values before its last 128; as KVQuant: everything.",
    ]
    coded = "codecs of the KV cache" if config["codec"] else ""
    chosen = "queries that choose what they read" if config.get("select") else ""
    what = " and ".join(part for part in (coded, chosen) if part)
    title = f"{config['model']}: {what}, chunks of {config['chunk_size']} tokens"
    return table_of(title, columns, rows, notes=notes)


def figure(result: Result) -> Figure:
    """How far predictions are off: by the bytes that a token takes with a codec, and by the share
    of the chunks that queries read; a panel for what was measured of both."""
    _, *measured = codec_measures(result.of_kind("codec"))
    chosen = [one for one in measured if choice_of(one.reads) is not None]
    coded = [one for one in measured if one not in chosen and one.bytes_per_token is not None]
    panels = [
        (
            coded,
            _draw_codecs,
            "what a smaller KV cache costs",
            "bytes of a token's keys and values",
        ),
        (chosen, _draw_choices, "what reading a part costs", "chunks that a query reads (%)"),
    ]
    panels = [panel for panel in panels if panel[0]] or panels[:1]
    drawn = make_figure(6.5 * len(panels), 4.0)
    for place, (drawn_here, draw, title, x) in enumerate(panels, start=1):
        axes = drawn.add_subplot(1, len(panels), place)
        draw(axes, drawn_here)
        axes.set_yscale("log")
        if drawn_here:
            axes.legend(loc="best", frameon=False)
        plain_axes(
            axes,
            f"{result.config['model']}: {title}",
            x,
            "KL divergence of the next token (nats)",
        )
    return drawn


def _recall_cell(one: CodecMeasures) -> str:
    if one.recall is None:
        return ""
    return f"{100 * one.recall['mean']:.1f}, {100 * one.recall['fifth']:.1f}"


def choice_of(reads: str) -> tuple[str, float] | None:
    """The policy and the share by which queries chose; None where they read all."""
    policy, _, share = reads.partition(" ")
    return (policy, float(share)) if policy in POLICIES + YARDSTICKS else None


def _draw_codecs(axes: Axes, measured: Sequence[CodecMeasures]) -> None:
    sizes = [one.bytes_per_token or 0.0 for one in measured]
    for index, one in enumerate(measured):
        style: dict[str, Any] = line_style(index) | {"linestyle": "none", "markersize": 8}
        label = one.codec if one.reads == "chunks" else one.reads
        axes.plot(sizes[index], max(one.divergence, LEAST), label=label, **style)
    axes.set_xlim(0, 1.1 * max(sizes, default=1))


def _draw_choices(axes: Axes, measured: Sequence[CodecMeasures]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in measured:
        choice = choice_of(one.reads)
        assert choice is not None, "they chose"
        policy, share = choice
        lines.setdefault(policy, []).append((100 * share, max(one.divergence, LEAST)))
    for index, (policy, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), label=policy, **line_style(index))
    axes.set_xlim(left=0)
