"""The picture of a run: how long requests waited and decoded on each side, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.plotting import BLUE, GREEN, LIMIT, ORANGE, make_figure
from experiments.serve.replay import Served

_STYLES = {
    "shared": (BLUE, "-", ""),
    "free-at-once": (GREEN, "--", ".."),
    "unshared": (ORANGE, ":", "//"),
}
_LONG_TAIL = 10  # times the median: then times are drawn on a logarithmic scale

Sides = Sequence[tuple[Mapping[str, Any], Sequence[Served]]]
"""The record and the requests of each side."""


def serving_figure(title: str, sides: Sides) -> Figure:
    """Three panels: time to first token and time per output token as distributions, hit rates."""
    figure = make_figure(12, 4.2)
    first, later, hits = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    figure.suptitle(title, fontsize="medium")
    _distributions(
        first,
        "Time to first token",
        "seconds",
        {record["side"]: [one.time_to_first_token for one in served] for record, served in sides},
    )
    per_token = {
        record["side"]: [
            1000 * one.seconds_per_output_token
            for one in served
            if one.seconds_per_output_token is not None
        ]
        for record, served in sides
    }
    _distributions(later, "Time per output token", "milliseconds", per_token)
    _hit_rates(hits, [record for record, _ in sides])
    for axes in (first, later, hits):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _distributions(axes: Axes, title: str, unit: str, values: Mapping[str, list[float]]) -> None:
    for side, each in values.items():
        if each:
            color, line, _ = _STYLES[side]
            axes.ecdf(each, label=side, color=color, linestyle=line, linewidth=2)
    everything = [value for each in values.values() for value in each]
    if everything and max(everything) > _LONG_TAIL * np.median(everything) > 0:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)


def _hit_rates(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        color, _, hatch = _STYLES[record["side"]]
        percent = 100 * record["hit_rate"]
        style = {"color": color, "edgecolor": "black", "linewidth": 0.6, "hatch": hatch}
        bar = axes.bar(record["side"], percent, width=0.6, **style)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.bar_label(bar, labels=[f"{percent:.1f}"], padding=5, bbox=behind)
    ideal = 100 * records[0]["hit_rate_ideal"]
    axes.axhline(ideal, **LIMIT)
    top = 1.25 * max(ideal, *(100 * record["hit_rate"] for record in records)) or 1
    # Above the bars' labels, which may stand at the line itself.
    axes.text(
        1,
        0.99,
        f"line: cache without bound, {ideal:.1f}",
        ha="right",
        va="top",
        transform=axes.transAxes,
    )
    axes.set_title("Prompt tokens found in the cache")
    axes.set_ylabel("% of prompt tokens")
    axes.set_ylim(0, top)
