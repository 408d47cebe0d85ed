"""What `serve` shows of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.harness.chunk_reads import reads_note
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, Row, format_bytes, table_of
from experiments.serve.figures import serving_figure
from experiments.serve.measures import served_of

Record = Mapping[str, Any]

_REASONS = {
    "hit": "found, in whole chunks",
    "host": "found, in memory of the host",
    "disk": "found, on the disk",
    "copied": "found, in a part of a chunk",
    "new": "never seen before",
    "evicted": "seen, and no longer kept",
    "window": "kept, and not for heads with windows",
    "salt": "seen, and not shared",
    "too_short": "behind the last whole chunk",
    "last": "last token, for its logits",
}

_RATIOS = {
    "time_to_first_token_mean": "time to first token, mean",
    "seconds_per_output_token_mean": "time per output token, mean",
    "normalised_latency_mean": "latency per output token, mean",
    "requests_per_second": "requests / s",
    "peak_kv_bytes": "KV cache in use, at most",
}


def tables(result: Result) -> list[ResultTable]:
    """What each side did, where its prompts' tokens came from, and its ratios to one side."""
    summary = result.summary or {}
    sides = summary["sides"]
    shown = [_found_and_held(summary, sides), _times(sides), _reasons(sides)]
    if len(sides) > 1:
        shown.append(_ratios(summary, sides))
    return shown


def figures(result: Result) -> dict[str, Figure]:
    """Times as distributions, and hit rates, of each side's typical round."""
    summary = result.summary or {}
    environment, config = result.environment, result.config
    title = f"{config['model']} on {environment['device']}, {summary['arrivals']}"
    requests = result.of_kind("request")
    sides = [
        (
            side,
            [
                served_of(line)
                for line in requests
                if (line["side"], line["round"]) == (side["side"], side["round"])
            ],
        )
        for side in summary["sides"]
    ]
    return {"picture": serving_figure(f"{title}\n{summary['scaling']}", sides)}


def _found_and_held(summary: Record, sides: list[Record]) -> ResultTable:
    """What does not depend on a clock when requests come in turns."""
    ideal = f"{sides[0]['hit_rate_ideal']:.1%} without bound"
    in_chunks = f"{sides[0]['chunk_hit_rate_ideal']:.1%} without bound"
    in_time = summary["at_once"] is None
    return table_of(
        f"{summary['num_requests']} requests ({summary['requests']}), {summary['arrivals']}",
        _columns(sides, timed=in_time),
        [
            _row(f"prompt tokens found ({ideal})", sides, _percent("hit_rate")),
            _row(f"  in whole chunks ({in_chunks})", sides, _percent("chunk_hit_rate")),
            _row("prompt tokens computed", sides, lambda r: f"{r['engine']['prefill_tokens']:,}"),
            _row("peak KV cache in use", sides, lambda r: format_bytes(r["peak_kv_bytes"])),
            _row("peak batch", sides, lambda r: f"{r['peak_running']:,}"),
            _row("evictions", sides, lambda r: f"{r['evictions']:,}"),
            _row("preemptions", sides, lambda r: f"{r['preemptions']:,}"),
        ],
        notes=_notes(summary, sides),
    )


def _times(sides: list[Record]) -> ResultTable:
    rows = [
        _row(
            "normalised latency, mean (ms/token)",
            sides,
            _quantile("normalised_latency", "mean", 1000),
        )
    ]
    for name, field, unit, factor in (
        ("time to first token", "time_to_first_token", "s", 1),
        ("time per output token", "seconds_per_output_token", "ms", 1000),
    ):
        for percent in (50, 90, 99):
            label = f"{name}, {percent}th percentile ({unit})"
            rows.append(_row(label, sides, _quantile(field, f"p{percent}", factor)))
    for name in ("requests", "output_tokens"):
        label = f"{name.replace('_', ' ')} / s"
        rows.append(_row(label, sides, lambda r, name=name: f"{r[f'{name}_per_second']:,.2f}"))
    compiled = sum(side["engine"]["compile_seconds"] for side in sides)
    note = f"Compiled during the measurements, not counted: {compiled:.1f} s."
    timed = [note] if compiled else []
    return table_of("Times", _columns(sides, timed=True), rows, timed_notes=timed)


def _reasons(sides: list[Record]) -> ResultTable:
    rows = [
        _row(label, sides, lambda r, key=reason: f"{r['prompt_tokens'].get(key, 0):,}")
        for reason, label in _REASONS.items()
    ]
    return table_of("Prompt tokens, by where they came from", _columns(sides), rows)


def _ratios(summary: Record, sides: list[Record]) -> ResultTable:
    base = summary["ratios_to"]
    others = [side for side in sides if side["side"] != base]
    title = f"Ratios to {base}"
    if summary["rounds"] > 1:
        title += f", median (least..most) of {summary['rounds']} rounds"
    rows = [
        (label, *(_ratio(summary["ratios"][side["side"]][name]) for side in others))
        for name, label in _RATIOS.items()
    ]
    return table_of(title, _columns(others, timed=True), rows)


def _notes(summary: Record, sides: list[Record]) -> list[str]:
    cut = "".join(
        f"; {summary[f'cut_{what}']} of {summary['num_requests']} {what} cut to fit the model"
        for what in ("prompts", "outputs")
        if summary[f"cut_{what}"]
    )
    notes = [f"Scaling: {summary['scaling']}{cut}."]
    notes += [
        f"Answers of {side['side']} equal to those of the first run: "
        f"{side['equal_answers']} of {side['requests']}."
        for side in sides
        if side["equal_answers"] is not None
    ]
    notes += [
        f"{side['side']}: {reads_note(reads)}." for side in sides if (reads := side.get("reads"))
    ]
    if summary["rounds"] > 1:
        notes.append("Of each side's rounds the one with the median latency is shown.")
    return notes


def _columns(sides: list[Record], *, timed: bool = False) -> list[Column]:
    return [Column("", numeric=False), *(Column(side["side"], timed=timed) for side in sides)]


def _row(label: str, sides: list[Record], shown: Callable[[Record], str]) -> Row:
    return (label, *map(shown, sides))


def _percent(field: str) -> Callable[[Record], str]:
    return lambda record: f"{record[field]:.1%}"


def _quantile(field: str, which: str, factor: float) -> Callable[[Record], str]:
    def shown(record: Record) -> str:
        values = record[field]
        if values is None:
            return "-"
        value = factor * values[which]
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return shown


def _ratio(values: Mapping[str, float] | None) -> str:
    if values is None:
        return "-"
    if values["least"] == values["most"]:
        return f"{values['median']:.2f}"
    return f"{values['median']:.2f} ({values['least']:.2f}..{values['most']:.2f})"
