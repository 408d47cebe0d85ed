"""What a kernel run shows: tables, and one picture of all cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.harness.reading import Result
from experiments.harness.tables import (
    Column,
    ResultTable,
    format_bytes,
    significant,
    table_of,
    times_as,
)
from experiments.kernel.summary import sides_of, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CASE_TABLES = 10
"""A suite with more cases has no table for each."""

Record = dict[str, Any]


def tables(result: Result) -> list[ResultTable]:
    """A table for each case of a small suite; then all cases, and all implementations."""
    records = result.of_kind("case")
    shown = [_case_table(record) for record in records] if len(records) <= MOST_CASE_TABLES else []
    notes = [result.header["scaling"]] if result.header["scaling"] else []
    return [*shown, _overview(result, records, notes), _sides_table(result, records, notes)]


def figures(result: Result) -> dict[str, Figure]:
    """Lines over the suffix for `hydragen`, bars for a few cases, points for many."""
    from experiments.kernel import figures as kernel_figures

    records = [record for record in result.of_kind("case") if record["implementations"]]
    picture = kernel_figures.draw(result, records)
    return {"picture": picture} if picture else {}


def _case_table(record: Record) -> ResultTable:
    rows = [_side_row(side) for side in record["implementations"]]
    floors = [_matmul_row(record["matmul"]), _read_row(record["memory_read"])] if rows else []
    headings = ("ms", "min..max", "vs paged", "GB/s", "of memory", "GFLOP/s", "of matmul")
    columns = (
        Column("", numeric=False),
        *(Column(heading, timed=True) for heading in headings),
        Column("max error"),
    )
    title = record["case"]
    if record["divided_by"] > 1:
        title += f" (for {record['full_tree']}, divided by {record['divided_by']})"
    return table_of(title, columns, rows, floors, notes=_case_notes(record))


def _side_row(side: Record) -> tuple[str, ...]:
    times = side["milliseconds"]
    return (
        side["implementation"],
        significant(times["median"]),
        _spread(times),
        times_as(side["speedup_over_paged"]),
        significant(side["distinct_kv_gb_per_second"]),
        _percent(side["of_memory_read"]),
        significant(side["gflops_per_second"]),
        _percent(side["of_matmul"]),
        f"{side['max_error']:.1e}",
    )


def _matmul_row(product: Record) -> tuple[str, ...]:
    times, rate = product["milliseconds"], significant(product["gflops_per_second"])
    name = f"matrix product n={product['size']}"
    return (name, significant(times["median"]), _spread(times), "", "", "", rate, "100%", "")


def _read_row(read: Record) -> tuple[str, ...]:
    times, rate = read["milliseconds"], significant(read["gb_per_second"])
    name = f"reading {format_bytes(read['bytes'])}"
    return (name, significant(times["median"]), _spread(times), "", rate, "100%", "", "", "")


def _case_notes(record: Record) -> list[str]:
    notes = [f"skipped {skip['implementation']}: {skip['reason']}" for skip in record["skipped"]]
    if record["plan"]:
        shared, unshared = record["distinct_kv_bytes"], record["unshared_kv_bytes"]
        notes.append(
            f"plan: {record['plan']['reason']}; {format_bytes(shared)} of distinct keys and "
            f"values, {format_bytes(unshared)} unshared"
        )
    return notes


def _overview(result: Result, records: list[Record], notes: Sequence[str]) -> ResultTable:
    names = [name for name in _names(records) if name != "reference"]
    columns = (
        Column("tree", numeric=False),
        Column("heads"),
        Column("reads"),
        *(Column(name.replace("-", " "), timed=True) for name in names),
        Column("floor", timed=True),
    )
    heads: dict[str, list[tuple[str, ...]]] = {}
    for record in records:
        heads.setdefault(_heads(record), []).append(_overview_row(record, names))
    config = result.config
    title = f"Milliseconds, {config['suite']}, {config['dtype']}"
    explained = (
        "medians. reads: chunks that our plan reads, of those it would read unshared. floor: the "
        "slower of a matrix product with as many operations, and of reading each distinct key and "
        "value once, at the rates measured in the same run."
    )
    before = ["trees are named as they were before they were divided."] if notes else []
    return table_of(title, columns, *heads.values(), notes=(explained, *notes, *before))


def _overview_row(record: Record, names: Sequence[str]) -> tuple[str, ...]:
    sides, plan = sides_of(record), record["plan"]
    return (
        record["full_tree"],
        _heads(record),
        _percent(plan["chunk_reads"] / plan["unshared_chunk_reads"]) if plan else "",
        *(significant(sides[n]["milliseconds"]["median"]) if n in sides else "" for n in names),
        significant(record["floor"]["milliseconds"]) if sides else "",
    )


def _sides_table(result: Result, records: list[Record], notes: Sequence[str]) -> ResultTable:
    ours = result.header["ours"]
    columns = (
        Column("", numeric=False),
        Column("cases"),
        Column("skipped"),
        Column("ours is faster", timed=True),
        Column("least", timed=True),
        Column("most", timed=True),
        Column("of floor", timed=True),
        Column("max error"),
    )
    rows = [
        (
            name,
            str(side["cases"]),
            str(side["skipped"] or ""),
            *(times_as(side[f"ours_faster{end}"]) for end in ("", "_least", "_most")),
            _percent(side["of_floor"]),
            "" if side["max_error"] is None else f"{side['max_error']:.1e}",
        )
        for name, side in summarise(records, ours).items()
    ]
    explained = (
        f"ours is {ours}. ours is faster: its time goes so often into the other's, the geometric "
        "mean over the cases that both ran. of floor: the floor over its time, the median. max "
        "error: against float64, over some rows and heads."
    )
    title = f"All implementations, {result.config['suite']}, {result.config['dtype']}"
    return table_of(title, columns, rows, notes=(explained, *notes, *_skip_notes(records)))


def _skip_notes(records: list[Record]) -> list[str]:
    """Each implementation's first reason, and in how many cases it was skipped."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        for skip in record["skipped"]:
            reasons.setdefault(skip["implementation"], []).append(skip["reason"])
    return [
        f"skipped {name}, {len(found)} of {len(records)} cases, first because {found[0]}"
        for name, found in reasons.items()
    ]


def _names(records: list[Record]) -> list[str]:
    """Implementations that were measured in some case."""
    return list(dict.fromkeys(name for record in records for name in sides_of(record)))


def _heads(record: Record) -> str:
    return f"{record['num_heads']}/{record['num_kv_heads']}"


def _spread(times: dict[str, float]) -> str:
    return f"{significant(times['least'])}..{significant(times['most'])}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}%"
