"""What all pictures share: colours, sizes, and files that are the same for the same data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.harness.reading import Record

# Okabe and Ito's palette, told apart by colour-blind readers; in a grey print a series is told
# apart by its marker and dashes, a bar by its hatch.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY, YELLOW, BLACK = "#D55E00", "#56B4E9", "#F0E442", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, YELLOW, BLACK)
MARKERS = "osD^vP*X"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), "-")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo")
LIMIT: dict[str, Any] = {"color": "#444444", "linestyle": (0, (6, 3)), "linewidth": 1.0}
"""How a limit or a published figure is drawn: never as a series of ours."""


def make_figure(width: float = 8.0, height: float = 4.0) -> Figure:
    """An empty figure in inches, laid out by its contents."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def line_style(index: int) -> dict[str, Any]:
    """Keywords of `Axes.plot` for the series of this index."""
    at = index % len(COLOURS)
    return {
        "color": COLOURS[at],
        "marker": MARKERS[at],
        "linestyle": DASHES[at],
        "markersize": 5,
        "linewidth": 1.6,
    }


def bar_style(index: int) -> dict[str, Any]:
    """Keywords of `Axes.bar` for the series of this index."""
    at = index % len(COLOURS)
    return {
        "color": COLOURS[at],
        "hatch": HATCHES[at],
        "edgecolor": "black",
        "linewidth": 0.6,
    }


def plain_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles with units, a light grid behind the data, no frame at the top and right."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def from_zero(axes: Axes, heights: Iterable[float], room: float) -> None:
    """Let the axis go from 0 to `room` times the largest height that is finite."""
    highest = max(filter(math.isfinite, heights), default=0.0)
    axes.set_ylim(0, room * highest or 1)


def figure_of_steps(
    steps: Sequence[Record], lines: Mapping[str, str], title: str, unit: str
) -> Figure:
    """How values of records fall with their `step`: a line for each label, of the value's name."""
    figure = make_figure(6.5, 4.0)
    axes = figure.subplots()
    for index, (label, name) in enumerate(lines.items()):
        values = [one[name] for one in steps]
        axes.plot([one["step"] for one in steps], values, label=label, **line_style(index))
    from_zero(axes, (one[name] for one in steps for name in lines.values()), room=1.1)
    axes.legend(loc="best", frameon=False)
    plain_axes(axes, title, "step", unit)
    return figure


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Each figure as NAME.png and NAME.svg; the same bytes for the same figure. Gives the PNGs."""
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "jax_chunkattn", "svg.fonttype": "none"}):
        for name, figure in figures.items():
            png = folder / f"{name}.png"
            figure.savefig(png, metadata={"Software": None})
            figure.savefig(png.with_suffix(".svg"), metadata={"Date": None})
            written.append(png)
    return written
