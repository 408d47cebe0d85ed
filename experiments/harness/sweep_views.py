"""What a sweep shows: its headlines in a table, and over the first option that is a number."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from experiments.harness.plotting import from_zero, line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, significant, table_of


def tables(result: Result) -> list[ResultTable]:
    """A row for each point."""
    points = result.of_kind("point")
    names = _headlines(points)
    fields = result.config["fields"]
    columns = [Column(field) for field in fields]
    columns += [Column(name, timed=True) for name in names]
    rows = [
        [*point["fields"].values(), *(_shown(point["headline"].get(name)) for name in names)]
        for point in points
    ]
    swept = ", ".join(field.replace("_", " ") for field in fields)
    notes = [f"FAILED: {failure}" for failure in (result.summary or {}).get("failures", ())]
    return [table_of(f"{result.config['of']} over {swept}", columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """A panel for each headline that is a number; none when no option that is swept is one."""
    points = result.of_kind("point")
    over = next((f for f in points[0]["fields"] if _numbers(p["fields"][f] for p in points)), None)
    names = [n for n in _headlines(points) if _numbers(p["headline"].get(n) for p in points)]
    if over is None or not names:
        return {}
    figure = make_figure(4.2 * len(names), 3.8)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for index, (series, its) in enumerate(_series(points, over).items()):
            x = [float(point["fields"][over]) for point in its]
            y = [float(point["headline"][name]) for point in its]
            axes.plot(x, y, label=series, **line_style(index))
        plain_axes(axes, "", over.replace("_", " "), name)
        heights = [float(point["headline"][name]) for point in points]
        if min(heights) >= 0:
            from_zero(axes, heights, room=1.05)
        axes.set_xticks(sorted({float(point["fields"][over]) for point in points}))
        axes.xaxis.set_major_formatter("{x:g}")
    if len(points[0]["fields"]) > 1:
        panels[0].legend(frameon=False)
    figure.suptitle(f"{result.config['of']} on {result.environment['device']}")
    return {"picture": figure}


def _headlines(points: list[Record]) -> list[str]:
    """Those of any point: what is swept may decide which there are."""
    return list(dict.fromkeys(name for point in points for name in point["headline"]))


def _series(points: list[Record], over: str) -> dict[str, list[Record]]:
    """Points by the values of all other options, in the order of `over`."""
    series: dict[str, list[Record]] = {}
    for point in sorted(points, key=lambda point: float(point["fields"][over])):
        others = {name: value for name, value in point["fields"].items() if name != over}
        series.setdefault(", ".join(f"{n}={v}" for n, v in others.items()), []).append(point)
    return series


def _numbers(values: Any) -> bool:
    try:
        return all(value is not None and math.isfinite(float(value)) for value in values)
    except ValueError:
        return False


def _shown(value: float | str | None) -> str:
    return value if isinstance(value, str) else significant(value)
