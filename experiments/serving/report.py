"""What `serve` prints for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.report import format_bytes, print_folder

Record = Mapping[str, Any]

_REASONS = {
    "hit": "found, in whole chunks",
    "copied": "found, in a part of a chunk",
    "new": "never seen before",
    "evicted": "seen, and no longer kept",
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


class ServeReport:
    """Tables on standard output; plain text where that is not a terminal."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = 120  # a file has no width to fit

    def print_run(self, summary: Record, folder: Path) -> None:
        """Everything, once all sides are done."""
        records = summary["sides"]
        self._print_measures(summary, records)
        self._print_reasons(records)
        self._print_ratios(summary, records)
        self._print_notes(summary, records)
        print_folder(self._console, folder)

    def _print_measures(self, summary: Record, records: list[Record]) -> None:
        title = f"{summary['num_requests']} requests ({summary['requests']}), {summary['arrivals']}"
        table = _table(title, records)
        ideal = f"{records[0]['hit_rate_ideal']:.1%} without bound"
        in_chunks = f"{records[0]['chunk_hit_rate_ideal']:.1%} without bound"
        _add(table, f"prompt tokens found ({ideal})", records, _percent("hit_rate"))
        _add(table, f"  in whole chunks ({in_chunks})", records, _percent("chunk_hit_rate"))
        computed = "prompt tokens computed"
        _add(table, computed, records, lambda r: f"{r['engine']['prefill_tokens']:,}")
        for name, field, unit, factor in (
            ("time to first token", "time_to_first_token", "s", 1),
            ("time per output token", "seconds_per_output_token", "ms", 1000),
        ):
            for percent in (50, 90, 99):
                label = f"{name}, {percent}th percentile ({unit})"
                _add(table, label, records, _quantile(field, f"p{percent}", factor))
        label = "latency per output token, mean (ms)"
        _add(table, label, records, _quantile("normalised_latency", "mean", 1000))
        for name in ("requests", "output_tokens"):
            label = f"{name.replace('_', ' ')} / s"
            _add(table, label, records, lambda r, name=name: f"{r[f'{name}_per_second']:,.2f}")
        _add(table, "KV cache in use, at most", records, lambda r: format_bytes(r["peak_kv_bytes"]))
        for name in ("peak_running", "evictions", "preemptions"):
            label = "running at once, at most" if name == "peak_running" else name
            _add(table, label, records, lambda r, name=name: f"{r[name]:,}")
        self._console.print(table)

    def _print_reasons(self, records: list[Record]) -> None:
        table = _table("Prompt tokens, by where they came from", records)
        for reason, label in _REASONS.items():
            _add(table, label, records, lambda r, key=reason: f"{r['prompt_tokens'][key]:,}")
        self._console.print(table)

    def _print_ratios(self, summary: Record, records: list[Record]) -> None:
        base = summary["ratios_to"]
        others = [record["side"] for record in records if record["side"] != base]
        if not others:
            return
        title = f"Ratios to {base}"
        if summary["rounds"] > 1:
            title += f", median (least..most) of {summary['rounds']} rounds"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for side in others:
            table.add_column(side, justify="right")
        for name, label in _RATIOS.items():
            table.add_row(label, *(_ratio(summary["ratios"][side][name]) for side in others))
        self._console.print(table)

    def _print_notes(self, summary: Record, records: list[Record]) -> None:
        cut = "".join(
            f"; {summary[f'cut_{what}']} of {summary['num_requests']} {what} cut to fit the model"
            for what in ("prompts", "outputs")
            if summary[f"cut_{what}"]
        )
        self._say(f"Scaling: {summary['scaling']}{cut}.")
        for record in records:
            if record["equal_answers"] is not None:
                self._say(
                    f"Answers of {record['side']} equal to those of the first run: "
                    f"{record['equal_answers']} of {record['requests']}."
                )
        if summary["rounds"] > 1:
            self._say("Of each side's rounds the one with the median latency is shown.")
        compiled = sum(record["engine"]["compile_seconds"] for record in records)
        if compiled:
            self._say(f"Compiled during the measurements, not counted: {compiled:.1f} s.")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


def _table(title: str, records: list[Record]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for record in records:
        table.add_column(record["side"], justify="right")
    return table


def _add(table: Table, label: str, records: list[Record], shown: Callable[[Record], str]) -> None:
    table.add_row(label, *map(shown, records))


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
