"""What `quality` shows: perplexities side by side, and how far log-probabilities are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.plotting import (
    bar_style,
    from_zero,
    line_style,
    make_figure,
    plain_axes,
)
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of
from experiments.quality import codec_views
from experiments.quality.measures import PATHS, Measures, differences, measures_of

NAMES = {
    "plain": "plain forward pass",
    "prefill": "prefill, shared prefix",
    "decode": "decode, shared prefix",
}
_COLUMNS = (
    Column("type", numeric=False),
    Column("computed by", numeric=False),
    Column("perplexity"),
    Column("less plain"),
    Column("largest |d|"),
    Column("mean |d|"),
    Column("same token"),
    Column("|d|, float32"),
)
_LEAST = 1e-7  # below it a difference is drawn as none


def tables(result: Result) -> list[ResultTable]:
    """Every type and path, or every codec."""
    if result.of_kind("codec"):
        return [codec_views.table(result)]
    records, config = result.of_kind("score"), result.config
    measured = measures_of(records)
    sections = [[_row(one) for one in measured if one.dtype == dtype] for dtype in config["dtypes"]]
    title = (
        f"{config['model']}: {config['windows']} windows of {config['window']} tokens behind "
        f"{config['prefix']:,} shared ones"
    )
    return [table_of(title, _COLUMNS, *sections, notes=_notes(result, records))]


def figures(result: Result) -> dict[str, Figure]:
    if result.of_kind("codec"):
        return {"quality": codec_views.figure(result)}
    figure = make_figure(9.5, 4.0)
    left, right = figure.subplots(1, 2)
    records = result.of_kind("score")
    _draw_perplexities(left, result.config["dtypes"], measures_of(records))
    _draw_differences(right, result.config["dtypes"], records)
    figure.suptitle(
        f"{result.config['model']} through the shared cache: "
        f"{result.config['windows']} windows behind {result.config['prefix']:,} shared tokens"
    )
    return {"quality": figure}


def _row(one: Measures) -> tuple[str, ...]:
    plain = one.path == "plain"
    return (
        one.dtype,
        NAMES[one.path],
        f"{one.perplexity:.5f}",
        "" if plain else f"{one.difference:+.1e}",
        "" if plain else f"{one.largest_difference:.1e}",
        "" if plain else f"{one.mean_difference:.1e}",
        "" if plain else f"{one.greedy_agreement:.2%}",
        "" if one.mean_error is None else f"{one.mean_error:.1e}",
    )


def _notes(result: Result, records: list[Record]) -> list[str]:
    config = result.config
    shared = next(record for record in records if "plan" in record)
    text = "the text that ships with this" if config["text"] is None else config["text"]
    return [
        f"Scored: {config['window'] * config['windows']:,} tokens of {text}, which has "
        f"{shared['text_tokens']:,}. Less plain: this perplexity less that of the plain pass in "
        "the same type. |d|: absolute differences of log-probabilities (nats) from that pass; in "
        "the last column their mean, from the plain pass in float32. Same token: where both find "
        "the same one likeliest.",
        f"Plan of the shared decode: {shared['plan']['reason']}. KV cache of {shared['dtype']}: "
        f"{format_bytes(shared['kv_bytes_held'])} held, {format_bytes(shared['kv_bytes_unshared'])}"
        " if nothing were shared.",
    ]


def _draw_perplexities(axes: Axes, dtypes: list[str], measured: list[Measures]) -> None:
    width = 0.8 / len(PATHS)
    for index, path in enumerate(PATHS):
        values = [one.perplexity for one in measured if one.path == path]
        places = np.arange(len(values)) + (index - (len(PATHS) - 1) / 2) * width
        style: dict[str, Any] = bar_style(index)
        bars = axes.bar(places, values, width, label=NAMES[path], **style)
        labels = [f"{value:.4f}" for value in values]
        axes.bar_label(bars, labels=labels, padding=4, rotation=90, fontsize=8)
    axes.set_xticks(range(len(dtypes)), dtypes)
    from_zero(axes, (one.perplexity for one in measured), room=1.6)
    axes.legend(loc="upper center", ncols=1, fontsize=8, frameon=False)
    plain_axes(axes, "Perplexity", "type of weights and cache", "perplexity")


def _draw_differences(axes: Axes, dtypes: list[str], records: list[Record]) -> None:
    """How many tokens are at most so far apart."""
    for index, dtype in enumerate(dtypes):
        apart = np.sort(np.maximum(differences(records, dtype, "decode"), _LEAST))
        share = 100 * np.arange(1, len(apart) + 1) / len(apart)
        style: dict[str, Any] = line_style(index) | {"markevery": max(1, len(apart) // 8)}
        axes.plot(apart, share, label=dtype, **style)
    axes.set_xscale("log")
    axes.set_xlim(_LEAST, 1)
    axes.set_ylim(0, 103)
    axes.legend(loc="upper left", frameon=False)
    plain_axes(
        axes,
        "Shared decode against the plain pass",
        "difference of a token's log-probability, at most (nats)",
        "share of tokens (%)",
    )
