"""What `gpu` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, significant, table_of


def tables(result: Result) -> list[ResultTable]:
    """What each part measured, and which goals it reached."""
    records = result.of_kind("record")
    shown = [
        _part(part, [record for record in records if record["part"] == part])
        for part in (result.summary or {})["parts"]
    ]
    goals = (result.summary or {})["goals"]
    if goals:
        columns = [Column(name, numeric=False) for name in ("goal", "outcome", "detail")]
        rows = [(goal["goal"], goal["outcome"], goal["detail"]) for goal in goals]
        shown.append(table_of("Goals", columns, rows))
    return shown


def figures(_: Result) -> dict[str, Figure]:
    """None: its parts have too little in common for one picture."""
    return {}


def _part(part: str, records: list[Record]) -> ResultTable:
    columns = [
        Column("case", numeric=False),
        Column("side", numeric=False),
        Column("measured", timed=True),
        Column("unit", numeric=False),
        Column("of the floor", timed=True),
    ]
    return table_of(part, columns, map(_row, records))


def _row(record: Record) -> tuple[str, ...]:
    start = (record["case"], record["side"])
    if record["status"] != "measured":
        return (*start, record["status"], record["message"][:100], "")
    value = record["value"]
    shown = significant(value) if isinstance(value, float) else str(value)
    fraction = record.get("fraction_of_floor")
    floor = "" if fraction is None else f"{fraction:.0%} ({record['floor']})"
    failed = " FAILED" if record.get("passed") is False else ""
    return (*start, shown + failed, record["unit"], floor)
