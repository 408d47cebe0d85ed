"""What `quality --codec` shows: what each codec does to predictions, and the bytes it takes."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.harness.plotting import line_style, make_figure, plain_axes
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of
from experiments.quality.measures import DEPTHS, SHOWN, STRING, codec_measures

LEAST = 1e-7
"""A divergence below is drawn as this one."""


def table(result: Result) -> ResultTable:
    config, measured = result.config, codec_measures(result.of_kind("codec"))
    exact = measured[0]
    lengths = [str(length) for length in config["copy_lengths"]]
    columns = (
        Column("codec", numeric=False),
        Column("reads", numeric=False),
        Column("bytes"),
        Column("KL"),
        Column("perplexity"),
        Column("change, %"),
        Column("same, %"),
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
        "A token reads chunks before its own encoded; as KIVI: keys before the last whole 128, "
        "values before its last 128; as KVQuant: everything.",
    ]
    title = f"{config['model']}: codecs of the KV cache, chunks of {config['chunk_size']} tokens"
    return table_of(title, columns, rows, notes=notes)


def figure(result: Result) -> Figure:
    """How far predictions are off, for the bytes that a token takes."""
    drawn = make_figure(6.5, 4.0)
    axes = drawn.subplots()
    _, *coded = codec_measures(result.of_kind("codec"))
    sizes = {one.codec: one.bytes_per_token for one in coded if one.bytes_per_token is not None}
    for index, one in enumerate(one for one in coded if one.bytes_per_token is not None):
        style: dict[str, Any] = line_style(index) | {"linestyle": "none", "markersize": 8}
        axes.plot(sizes[one.codec], max(one.divergence, LEAST), label=one.codec, **style)
    axes.set_yscale("log")
    axes.set_xlim(0, 1.1 * max(sizes.values(), default=1))
    axes.legend(loc="best", frameon=False)
    plain_axes(
        axes,
        f"{result.config['model']}: what a smaller KV cache costs",
        "bytes of a token's keys and values",
        "KL divergence of the next token (nats)",
    )
    return drawn
