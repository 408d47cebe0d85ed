"""The picture of a soak: throughput, requests, chunks and memory over time."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.plotting import BLUE, GREEN, ORANGE, SKY, VERMILION, make_figure
from experiments.soak.checks import MEMORY_GROWTH

_MEBIBYTE = 1 << 20
MOST_POINTS = 400  # lines beyond that are averaged


def soak_figure(intervals: list[dict[str, Any]], summary: dict[str, Any]) -> Figure:
    """Five panels over one axis of time."""
    figure = make_figure(10, 11)
    panels = figure.subplots(5, 1, sharex=True)
    rates, requests, chunks, given_up, memory = panels
    title = "passed" if not summary["failures"] else "FAILED"
    figure.suptitle(
        f"soak of {summary['model']}: {summary['requests']:,} requests, "
        f"{summary['decode_tokens']:,} tokens; {title}"
    )
    series = _Series(intervals)
    rates.plot(series.minutes, series.rate("decode_tokens"), color=BLUE, label="decoded")
    rates.plot(
        series.minutes,
        series.rate("prefill_tokens"),
        color=ORANGE,
        linestyle="--",
        label="prompt, computed",
    )
    rates.set_ylabel("tokens per second")

    requests.fill_between(
        series.minutes, series.mean("waiting"), color=ORANGE, alpha=0.6, lw=0, label="waiting"
    )
    requests.plot(series.minutes, series.mean("running"), color=BLUE, label="running")
    requests.set_ylabel("requests")

    chunks.stackplot(
        series.minutes,
        *(series.mean(f"chunks_{name}") for name in ("in_use", "cached", "free")),
        colors=(BLUE, SKY, "#E8E8E8"),
        labels=("in use", "cached", "free"),
        lw=0,
    )
    chunks.set_ylabel("chunks")

    given_up.plot(series.minutes, series.rate("evictions"), color=SKY, label="chunks evicted")
    given_up.plot(
        series.minutes,
        series.rate("preemptions"),
        color=VERMILION,
        linestyle="--",
        label="requests preempted",
    )
    given_up.set_yscale("symlog", linthresh=1)
    given_up.set_ylabel("per second")

    _draw_memory(memory, series, summary)
    for axes in panels:
        _finish(axes, intervals)
    memory.set_xlabel("minutes (hatched: warm-up, and the end, when nobody comes any more)")
    return figure


def _draw_memory(axes: Axes, series: _Series, summary: dict[str, Any]) -> None:
    axes.plot(series.minutes, series.mean("resident_bytes") / _MEBIBYTE, color=GREEN)
    axes.set_ylabel("resident memory, MiB")
    if summary["resident_bytes"]:
        median = summary["resident_bytes"] / _MEBIBYTE
        axes.axhspan(
            (1 - MEMORY_GROWTH) * median,
            (1 + MEMORY_GROWTH) * median,
            color=GREEN,
            alpha=0.15,
            lw=0,
            label=f"median of the soak, ±{MEMORY_GROWTH:.0%}",
        )


def _finish(axes: Axes, intervals: list[dict[str, Any]]) -> None:
    """Shades what is not the soak itself; a legend above, and no box."""
    soaked = [line["seconds"] / 60 for line in intervals if line["phase"] == "soak"]
    end = intervals[-1]["seconds"] / 60
    if soaked:
        for begin, until in ((0, soaked[0]), (soaked[-1], end)):
            axes.axvspan(begin, until, facecolor="none", edgecolor="#BBBBBB", hatch="//", lw=0)
    axes.set_xlim(0, end)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=3, frameon=False)


class _Series:
    """The lines as arrays, averaged in groups where there are too many to draw."""

    def __init__(self, intervals: list[dict[str, Any]]):
        self._intervals = intervals
        self._starts = np.unique(
            np.linspace(0, len(intervals), MOST_POINTS, endpoint=False).astype(int)
        )
        self._seconds = self._sum("interval_seconds")
        self.minutes = self.mean("seconds") / 60

    def rate(self, name: str) -> np.ndarray:
        """Of something counted in each interval, per second."""
        return self._sum(name) / np.maximum(self._seconds, 1e-9)

    def mean(self, name: str) -> np.ndarray:
        counts = np.diff(np.append(self._starts, len(self._intervals)))
        return self._sum(name) / counts

    def _sum(self, name: str) -> np.ndarray:
        values = np.array([line[name] or 0 for line in self._intervals], float)
        return np.add.reduceat(values, self._starts)
