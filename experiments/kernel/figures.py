"""The picture of a kernel run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.harness.plotting import (
    COLOURS,
    LIMIT,
    bar_style,
    line_style,
    make_figure,
    plain_axes,
)
from experiments.harness.reading import Result
from experiments.kernel.published import LABEL, published_speedups
from experiments.kernel.summary import median_of, sides_of

MOST_BARS_CASES = 12
_HIDDEN = ("reference",)  # the definition: it is there to be right
_FLOOR = "floor: memory or matrix product"
_LEGEND_COLUMN = 2.6  # inches

Record = dict[str, Any]
Value = Callable[[Record, str], float]


def draw(result: Result, records: Sequence[Record]) -> Figure | None:
    """`records` are cases in which something was measured; None where all of it is hidden."""
    if not _names(records):
        return None
    if result.config["suite"] == "hydragen":
        return _suffix_lines(result, records)
    if len(records) <= MOST_BARS_CASES:
        return _speedup_bars(result, records)
    return _relative_points(result, records)


def _title(result: Result) -> str:
    divisor = next(iter(result.of_kind("case")))["divided_by"]
    divided = f", sizes divided by {divisor}" if divisor > 1 else ""
    return f"{result.config['suite']}{divided}, {result.config['dtype']}"


def _names(records: Sequence[Record], *without: str | None) -> list[str]:
    """What was measured in some case, in order."""
    names = dict.fromkeys(name for record in records for name in sides_of(record))
    return [name for name in names if name not in (*_HIDDEN, *without)]


# Bars: a few cases.


def _speedup_bars(result: Result, records: Sequence[Record]) -> Figure:
    """How many times faster than paged attention, and which part of the floor."""
    ours = result.header["ours"]
    names = _names(records)
    base = "paged" if all("paged" in sides_of(record) for record in records) else None
    figure = make_figure(max(8.0, 1.5 + 1.25 * len(records)), 7.5 if base else 4.2)
    figure.suptitle(f"Decode attention: {_title(result)}")
    axes = figure.subplots(2 if base else 1, 1, squeeze=False)[:, 0]
    published: list[Line2D] = []
    if base:
        _bars(axes[0], records, names, lambda record, name: _ratio(record, base, name))
        axes[0].axhline(1, **LIMIT)
        plain_axes(axes[0], "Speed-up over paged attention", "", "times as fast as paged")
        marked = [_mark_published(axes[0], i, r, names, ours) for i, r in enumerate(records)]
        published = [_published_handle()] if any(marked) else []
    _bars(axes[-1], records, names, lambda record, name: 100 * sides_of(record)[name]["of_floor"])
    axes[-1].axhline(100, **LIMIT)
    title = "How near the floor: the slower of reading keys and values once, and a matrix product"
    plain_axes(axes[-1], title, "", "floor / time, %")
    _legend(figure, axes[-1], published)
    return figure


def _bars(axes: Axes, records: Sequence[Record], names: list[str], value: Value) -> None:
    width = 0.86 / len(names)
    for at, name in enumerate(names):
        there = [i for i, record in enumerate(records) if name in sides_of(record)]
        places = [i + (at - (len(names) - 1) / 2) * width for i in there]
        heights = [value(records[i], name) for i in there]
        axes.bar(places, heights, width=width, label=name, **bar_style(at))
    axes.set_xticks(range(len(records)), [_case_label(record) for record in records], fontsize=8)


def _mark_published(
    axes: Axes, index: int, record: Record, names: list[str], ours: str | None
) -> bool:
    published = published_speedups(record, ours)
    width = 0.86 / len(names)
    for name, speedup in published.items():
        if name in names:
            place = index + (names.index(name) - (len(names) - 1) / 2) * width
            axes.plot(place, speedup, **_PUBLISHED)
    return bool(published)


_PUBLISHED: dict[str, Any] = {
    "marker": "D",
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 5,
    "linestyle": "none",
}


def _published_handle() -> Line2D:
    return Line2D([], [], label=f"{LABEL} (ChunkAttn, PagedAttn*)", **_PUBLISHED)


def _case_label(record: Record) -> str:
    nodes, _, tokens = record["tree"].partition("_")
    heads = f"{record['num_heads']}/{record['num_kv_heads']} heads"
    return f"{nodes} nodes\n{tokens} tokens\n{heads}"


# Lines over the suffix: one prefix, many rows.


def _suffix_lines(result: Result, records: Sequence[Record]) -> Figure:
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(_group(record), []).append(record)
    names = _names(records)
    across = min(4, len(groups))
    down = -(-len(groups) // across)
    figure = make_figure(max(5.0, 3.1 * across), 1.0 + 3.2 * down)
    figure.suptitle(f"Decode attention behind one prefix: {_title(result)}")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (group, members) in zip(panels, groups.items(), strict=False):
        members = sorted(members, key=_suffix)
        for name in names:
            there = [record for record in members if name in sides_of(record)]
            times = [median_of(record, name) for record in there]
            style = _series_style(names.index(name))
            axes.plot([_suffix(record) for record in there], times, label=name, **style)
        floors = [record["floor"]["milliseconds"] for record in members]
        axes.plot([_suffix(record) for record in members], floors, label=_FLOOR, **LIMIT)
        axes.set_yscale("log")
        batch, prefix, heads, kv_heads = group
        title = f"{batch} rows, prefix {prefix}\n{heads}/{kv_heads} heads"
        plain_axes(axes, title, "tokens of each row's own", "")
        _plain_numbers(axes.yaxis)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.supylabel("milliseconds")
    _legend(figure, figure.axes[0], [])
    return figure


def _group(record: Record) -> tuple[int, ...]:
    prefix = record["tree"].partition("_")[2].split(",")[0]
    return record["batch"], int(prefix), record["num_heads"], record["num_kv_heads"]


def _suffix(record: Record) -> int:
    return int(record["tree"].partition("_")[2].split(",")[1])


def _series_style(index: int) -> dict[str, Any]:
    """Beyond as many series as there are colours, markers are hollow."""
    hollow = {"markerfacecolor": "white"} if index >= len(COLOURS) else {}
    return {**line_style(index), **hollow}


# Points: many cases.


def _relative_points(result: Result, records: Sequence[Record]) -> Figure:
    """Every time over ours, a row for each tree and a panel for each pair of heads."""
    ours = result.header["ours"] or _names(records)[0]
    records = [record for record in records if ours in sides_of(record)]
    trees = list(dict.fromkeys(record["full_tree"] for record in records))
    panels = list(dict.fromkeys((r["num_heads"], r["num_kv_heads"]) for r in records))
    names = _names(records, ours)
    figure = make_figure(4.0 + 2.6 * len(panels), 2.0 + 0.3 * len(trees))
    figure.suptitle(f"Decode attention: {_title(result)}. Time over that of {ours}")
    all_axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    for axes, heads in zip(all_axes, panels, strict=True):
        members = [r for r in records if (r["num_heads"], r["num_kv_heads"]) == heads]
        for name in names:
            there = [record for record in members if name in sides_of(record)]
            aside = 0.5 * ((names.index(name) + 0.5) / len(names) - 0.5)  # so that none is hidden
            places = [trees.index(record["full_tree"]) + aside for record in there]
            style = _series_style(names.index(name)) | {"linestyle": "none"}
            axes.plot([_ratio(r, name, ours) for r in there], places, label=name, **style)
        floors = [
            record["floor"]["milliseconds"] / (median_of(record, ours) or 1) for record in members
        ]
        places = [trees.index(record["full_tree"]) for record in members]
        axes.plot(floors, places, label=_FLOOR, **_FLOOR_TICK)
        axes.axvline(1, **LIMIT)
        axes.set_xscale("log")
        plain_axes(axes, f"{heads[0]}/{heads[1]} heads", "times ours", "")
        _plain_numbers(axes.xaxis)
        axes.grid(visible=True, axis="both", color="#dddddd", linewidth=0.6)
    all_axes[0].set_yticks(range(len(trees)), trees, fontsize=8)
    all_axes[0].set_ylim(len(trees) - 0.5, -0.5)
    _legend(figure, all_axes[0], [])
    return figure


_FLOOR_TICK: dict[str, Any] = {
    "marker": "|",
    "color": LIMIT["color"],
    "markersize": 9,
    "markeredgewidth": 2,
    "linestyle": "none",
}


def _ratio(record: Record, name: str, other: str) -> float:
    return median_of(record, name) / median_of(record, other)


def _legend(figure: Figure, axes: Axes, more: list[Line2D]) -> None:
    """Below everything, so that it hides nothing."""
    handles, _ = axes.get_legend_handles_labels()
    handles = [*handles, *more]
    columns = min(len(handles), int(figure.get_figwidth() / _LEGEND_COLUMN))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _plain_numbers(axis: Axis) -> None:
    """On a logarithmic axis: 1, 2, 5, 10, not powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
