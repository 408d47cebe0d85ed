"""What `kernel` prints for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.harness.console import make_console
from experiments.harness.tables import format_bytes


class KernelReport:
    """Tables on standard output; plain text where that is not a terminal."""

    def __init__(self):
        self._console = make_console()

    @contextmanager
    def working_on(self, case: str) -> Iterator[None]:
        """Says on a terminal which case is being measured."""
        with self._console.status(case) if self._console.is_terminal else _nothing():
            yield

    def print_case(self, record: dict[str, Any]) -> None:
        """Times and rates of every implementation of a case, what it skipped, and the floors."""
        if record["implementations"]:
            self._print_times(record)
        else:
            self._console.print(record["case"], style="italic")
        for skip in record["skipped"]:
            self._console.print(f"skipped {skip['implementation']}: {skip['reason']}", markup=False)
        self._console.print()

    def _print_times(self, record: dict[str, Any]) -> None:
        table = Table(title=record["case"], title_justify="left")
        table.add_column("")
        for heading in ("ms", "min..max", "x matmul", "vs paged", "GFLOP/s", "GB/s", "max error"):
            table.add_column(heading, justify="right")
        for side in record["implementations"]:
            times = side["milliseconds"]
            table.add_row(
                side["implementation"],
                _significant(times["median"]),
                _spread(times),
                f"{side['times_matmul']:.2f}",
                _speedup(side["speedup_over_paged"]),
                _significant(side["gflops_per_second"]),
                _significant(side["distinct_kv_gb_per_second"]),
                f"{side['max_error']:.1e}",
            )
        table.add_section()
        product, read = record["matmul"], record["memory_read"]
        table.add_row(
            f"matrix product n={product['size']}",
            _significant(product["milliseconds"]["median"]),
            _spread(product["milliseconds"]),
            "1.00",
            "",
            _significant(product["gflops_per_second"]),
        )
        table.add_row(
            f"reading {format_bytes(read['bytes'])}",
            _significant(read["milliseconds"]["median"]),
            _spread(read["milliseconds"]),
            *("", "", ""),
            _significant(read["gb_per_second"]),
        )
        self._console.print(table)
        self._console.print(
            f"plan: {record['plan']['reason']}; {format_bytes(record['distinct_kv_bytes'])} of "
            f"distinct keys and values, {format_bytes(record['unshared_kv_bytes'])} unshared",
            markup=False,
        )

    def print_overview(self, records: list[dict[str, Any]]) -> None:
        """A line for each case: what our default did, with the plan's decision."""
        ours = [(record, _of(record, "xla")) for record in records]
        if not any(side for _, side in ours):
            return
        table = Table(title="xla in every case", title_justify="left")
        table.add_column("case")
        for heading in ("ms", "x matmul", "vs paged", "chunk reads", "unshared"):
            table.add_column(heading, justify="right")
        for record, side in ours:
            if side is None:
                table.add_row(record["case"], "skipped")
                continue
            table.add_row(
                record["case"],
                _significant(side["milliseconds"]["median"]),
                f"{side['times_matmul']:.2f}",
                _speedup(side["speedup_over_paged"]),
                f"{record['plan']['chunk_reads']:,}",
                f"{record['plan']['unshared_chunk_reads']:,}",
            )
        self._console.print(table)
        self._console.print(
            "ms: median. x matmul: its time over that of one square matrix product with as many "
            "operations.\nvs paged: how many times faster than paged attention with a copy of "
            "every chunk for each row.\nGB/s: distinct keys and values over the time. max error: "
            "against float64, over some rows and heads."
        )

    def print_folder(self, folder: Path) -> None:
        self._console.print(f"results: {folder}", markup=False, soft_wrap=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _of(record: dict[str, Any], implementation: str) -> dict[str, Any] | None:
    sides = record["implementations"]
    return next((side for side in sides if side["implementation"] == implementation), None)


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spread(times: dict[str, float]) -> str:
    return f"{_significant(times['least'])}..{_significant(times['most'])}"


def _speedup(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
