"""What the run prints for people: a line for each record."""

from __future__ import annotations

from typing import Any


def print_record(record: dict[str, Any]) -> None:
    """One line on standard output."""
    start = f"{record['part']:<12} {record['case']:<46} {record['side']:<28}"
    if record["status"] != "measured":
        print(f"{start} {record['status'].upper()}: {record['message'][:160]}", flush=True)
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
    print(line, flush=True)


def print_goals(goals: list[dict[str, Any]]) -> None:
    for goal in goals:
        print(f"goal: {goal['goal']}: {goal['outcome'].upper()} ({goal['detail']})", flush=True)
