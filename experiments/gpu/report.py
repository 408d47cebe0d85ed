"""What the run prints for people: a line for each record."""

from __future__ import annotations

from typing import Any

from experiments.harness.console import make_console


def print_record(record: dict[str, Any]) -> None:
    """One line on standard output."""
    start = f"{record['part']:<12} {record['case']:<46} {record['side']:<28}"
    if record["status"] != "measured":
        _say(f"{start} {record['status'].upper()}: {record['message'][:160]}")
        return
    value = record["value"]
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    line = f"{start} {text:>10} {record['unit']}"
    if "least" in record:
        line += f" ({record['least']:.4g}..{record['most']:.4g})"
    if record.get("fraction_of_floor") is not None:
        line += f" {record['fraction_of_floor']:.0%} of the {record['floor']} floor"
    if record.get("passed") is False:
        line += " FAILED"
    _say(line)


def _say(line: str) -> None:
    make_console().print(line, markup=False, soft_wrap=True)
