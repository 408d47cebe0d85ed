"""What `compile-report` shows of a result, and what it holds to be a failure."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of


def _by_name(records: Sequence[Record]) -> list[Record]:
    """Not as they came, which depends on which process was done first."""
    return sorted(records, key=operator.itemgetter("name"))


def failures_of(records: Sequence[Record]) -> list[str]:
    """What must not be, in words: one entry for each case, by name."""
    failures = []
    for record in _by_name(records):
        name = record["name"]
        if "error" in record:
            failures.append(f"{name}: {record['error']}")
            continue
        spilling = [kernel["name"] for kernel in record["kernels"] if kernel["spill_stores"]]
        if spilling:
            failures.append(f"{name}: {' and '.join(spilling)} spills registers")
        if record.get("pool_copies"):
            failures.append(f"{name}: copies the pool ({'; '.join(record['pool_copies'])})")
    return failures


def tables(result: Result) -> list[ResultTable]:
    """A line for each kernel of each variant, and one for each whole program, by name."""
    device = (result.summary or {})["device_kind"]
    shown = []
    if kernels := _by_name(result.of_kind("kernel")):
        shown.append(_kernels(device, kernels))
    if programs := _by_name(result.of_kind("program")):
        shown.append(_programs(device, programs))
    return shown


def figures(_: Result) -> dict[str, Figure]:
    """None: there is nothing to compare by eye."""
    return {}


def _kernels(device: str, records: Sequence[Record]) -> ResultTable:
    names = ("chunk", "instructions", "registers", "spilled", "shared KiB", "threads", "per SM")
    columns = [
        *(Column(name, numeric=False) for name in ("variant", "kernel")),
        *map(Column, names),
        Column("compile s", timed=True),
    ]
    rows = []
    for record in records:
        if "error" in record:
            rows.append((record["name"], "does not compile", *[""] * 8))
        chunk_bytes = record.get("chunk_bytes")
        for index, kernel in enumerate(record.get("kernels", ())):
            rows.append(
                (
                    "" if index else record["name"],
                    kernel["name"],
                    "" if index or not chunk_bytes else format_bytes(chunk_bytes),
                    str(kernel.get("instructions", "")),
                    str(kernel["registers"]),
                    format_bytes(kernel["spill_stores"]) if kernel["spill_stores"] else "",
                    f"{kernel['shared'] / 1024:.1f}",
                    str(kernel["threads"]),
                    str(kernel["occupancy"]),
                    "" if index else f"{record['compile_seconds']:.1f}",
                )
            )
    note = (
        "chunk: its keys and values, of one head; instructions: of the PTX; registers: of a "
        "thread; per SM: programs that a multiprocessor can hold at a time; "
        "compile s: of the variant's kernels together"
    )
    return table_of(f"Kernels compiled for {device}", columns, rows, notes=[note])


def _programs(device: str, records: Sequence[Record]) -> ResultTable:
    names = ("temporaries", "in place", "pool copied", "captured")
    columns = [
        Column("program", numeric=False),
        *map(Column, names),
        Column("compile s", timed=True),
    ]
    rows = []
    for record in records:
        if "error" in record:
            rows.append((record["name"], "does not compile", *[""] * 4))
            continue
        launches = record["pallas_launches"]
        rows.append(
            (
                record["name"],
                format_bytes(record["temporary_bytes"]),
                format_bytes(record["aliased_bytes"]),
                "YES" if record["pool_copies"] else "no",
                f"{record['captured_pallas_launches']} of {launches}" if launches else "no kernels",
                f"{record['compile_seconds']:.1f}",
            )
        )
    note = (
        "in place: bytes of arguments that results are written over, of each device; captured: "
        "kernel launches inside command buffers"
    )
    title = f"Programs of an 8B model, bfloat16, compiled for {device}"
    return table_of(title, columns, rows, notes=[note])
