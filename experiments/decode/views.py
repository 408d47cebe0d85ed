"""What `decode` shows: tokens per second of both sides over what the study varies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.decode.measures import SIDES, Measured, Spread, measured
from experiments.decode.points import HYDRAGEN_LOSS, STUDIES, Study
from experiments.harness.plotting import LIMIT, line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import (
    Column,
    ResultTable,
    format_bytes,
    significant,
    table_of,
    times_as,
)


def tables(result: Result) -> list[ResultTable]:
    """The study, how much is lost over the longest prefix, and whether the tokens are the same."""
    config, points = result.config, _points(result)
    shown = [_study_table(config, points)]
    if config["study"] == "shared":
        shown += _flatness(points)
    return shown + [_tokens_table(config, record) for record in result.of_kind("tokens")]


def figures(result: Result) -> dict[str, Figure]:
    config = result.config
    study = STUDIES[config["study"]]
    panels = _panels(config, _points(result))
    figure = make_figure(max(6.5, 3.6 * len(panels)), 4.0)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        _draw(axes, config, study, points)
        y = "tokens per second" if axes is all_axes[0] else ""
        plain_axes(axes, title, study.varies, y)
    all_axes[0].set_ylim(bottom=0)  # only now: it keeps the top, which all panels have in common
    drawn = [axes for axes in all_axes if axes.get_legend_handles_labels()[0]]
    if drawn:
        drawn[0].legend(loc="best", frameon=False)
    figure.suptitle(f"Decoding, {_setting(config)}")
    return {"decode": figure}


def _points(result: Result) -> list[Measured]:
    return measured(result.config["study"], result.of_kind("point"))


def _panels(config: Record, points: list[Measured]) -> dict[str, list[Measured]]:
    """One for each series; the study of shared lengths is one series."""
    if config["study"] == "shared":
        return {"": points}
    return {
        f"{ns:,} shared tokens": list(series)
        for ns, series in groupby(points, key=lambda point: point.shared_tokens)
    }


def _setting(config: Record) -> str:
    """What all points have in common."""
    parts = [config["model"]]
    if config["study"] != "batch":
        parts.append(f"{config['rows']} rows")
    if config["study"] != "completion":
        parts.append(f"{config['tokens']} tokens each")
    return f"{', '.join(parts)}, {config['dtype']}"


def _study_table(config: Record, points: list[Measured]) -> ResultTable:
    study = STUDIES[config["study"]]
    columns = [Column("shared tokens")] if config["study"] != "shared" else []
    columns.append(Column(study.varies))
    for side in config["sides"]:
        columns.append(Column(f"{side}, tokens/s", timed=True))
    columns.append(Column("times as fast", timed=True))
    columns += [Column(f"{side} KV") for side in config["sides"]] + [Column("rows equal")]
    sections = [
        [_row(config, point) for point in series] for series in _panels(config, points).values()
    ]
    notes = [
        f"Medians of {config['rounds']} rounds, and half of what lies between the least and the "
        "most. Compilation, prefill and the engine's host work are not in them. KV: keys and "
        "values held. Rows equal: those whose tokens are the same on both sides."
    ]
    skips = {
        f"skipped {side} at {point.x:,} {study.varies}, {point.shared_tokens:,} shared: {reason}"
        if config["study"] != "shared"
        else f"skipped {side} at {point.x:,} shared tokens: {reason}": None
        for point in points
        for side, reason in point.skipped.items()
    }
    notes += [*skips, *([study.published] if study.published else [])]
    title = f"decoding over {study.varies}: {_setting(config)}"
    return table_of(title, columns, *sections, notes=notes)


def _row(config: Record, point: Measured) -> list[str]:
    cells = [f"{point.shared_tokens:,}"] if config["study"] != "shared" else []
    cells.append(f"{point.x:,}")
    for side in config["sides"]:
        cells.append(_with_spread(significant, point.rates.get(side)))
    cells.append(_with_spread(times_as, point.ratio))
    cells += [
        format_bytes(point.kv_bytes[side]) if side in point.kv_bytes else "skipped"
        for side in config["sides"]
    ]
    return [*cells, "" if point.equal_rows is None else f"{point.equal_rows}/{point.rows}"]


def _with_spread(show: Callable[[float], str], spread: Spread | None) -> str:
    if spread is None:
        return ""
    half = (spread.most - spread.least) / 2
    return f"{show(spread.median)} ±{half / spread.median:.0%}"


def _flatness(points: list[Measured]) -> list[ResultTable]:
    """From the shortest prefix to the longest, of each side that was measured at two or more."""
    rows = []
    for side in SIDES:
        with_prefix = [point for point in points if point.x and side in point.rates]
        if len(with_prefix) > 1:
            first, last = with_prefix[0], with_prefix[-1]
            lost = 1 - last.rates[side].median / first.rates[side].median
            rows.append((side, f"{first.x:,}", f"{last.x:,}", f"{lost:.1%}"))
    columns = [
        Column("", numeric=False),
        Column("from shared tokens"),
        Column("to"),
        Column("tokens/s lost", timed=True),
    ]
    notes = [
        "Sharing saves reading a prefix for every row, not multiplying with it: attention to the "
        f"prompt takes {points[-1].attention_share:.2g} operations for one of the products with "
        f"weights at {points[-1].x:,} shared tokens, {points[0].attention_share:.2g} at "
        f"{points[0].x:,}. A device that multiplies faster than it reads loses less."
    ]
    return [table_of("what a longer prefix costs", columns, rows, notes=notes)] if rows else []


def _tokens_table(config: Record, record: Record) -> ResultTable:
    columns = [
        Column("", numeric=False),
        Column("plan", numeric=False),
        Column("tokens of", numeric=False),
    ]
    rows = [(side, record["plans"][side], record["digests"][side]) for side in SIDES]
    notes = [
        f"{record['equal_tokens']} of {record['tokens']} greedy tokens are equal, of "
        f"{record['prompts']} prompts with {record['common_prefix']:,} tokens in common. "
        "In float32 they are, unless the best two logits are closer than rounding.",
        *([record["note"]] if record["note"] else []),
    ]
    title = f"the engine's answers with and without sharing: {config['model']}, {config['dtype']}"
    return table_of(title, columns, rows, notes=notes)


def _draw(axes: Axes, config: Record, study: Study, points: list[Measured]) -> None:
    for index, side in enumerate(SIDES):
        drawn = [(point.x, point.rates[side]) for point in points if side in point.rates]
        if not drawn:
            continue
        xs, rates = zip(*drawn, strict=True)
        below = [rate.median - rate.least for rate in rates]
        above = [rate.most - rate.median for rate in rates]
        medians = [rate.median for rate in rates]
        style: dict[str, Any] = line_style(index)
        axes.errorbar(xs, medians, yerr=(below, above), capsize=2, label=side, **style)
    if config["study"] == "shared":
        _draw_hydragen(axes, points)
    values = sorted({point.x for point in points})
    if study.log:
        least = next((value for value in values if value), 1)
        axes.set_xscale("symlog", base=2, linthresh=least, linscale=0.7)
    axes.set_xticks(values, [f"{value:,}" for value in values], minor=False)


def _draw_hydragen(axes: Axes, points: list[Measured]) -> None:
    """The loss that Hydragen states, from our rate at the shortest prefix."""
    shared = [point for point in points if point.x and "shared" in point.rates]
    if len(shared) < 2:
        return
    bound = (1 - HYDRAGEN_LOSS) * shared[0].rates["shared"].median
    style: dict[str, Any] = LIMIT
    label = f"{HYDRAGEN_LOSS:.0%} less (Hydragen, A100)"
    axes.plot([shared[0].x, shared[-1].x], [bound, bound], label=label, **style)
