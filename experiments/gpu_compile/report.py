"""What `compile-report` prints, and what it holds to be a failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.gpu_compile.target import GpuTarget
from experiments.report import format_bytes, print_folder


def failures_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, in words: one entry for each case."""
    failures = []
    for record in records:
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


class CompileReport:
    """Prints the tables of one run."""

    def __init__(self, target: GpuTarget, console: Console | None = None) -> None:
        self._target = target
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = 150  # a file has no width to fit

    def print_kernels(self, records: Sequence[dict[str, Any]]) -> None:
        """A line for each kernel of each variant."""
        if not records:
            return
        table = Table(title=f"Kernels on {self._target.device_kind}", title_justify="left")
        table.add_column("variant", no_wrap=True)
        table.add_column("kernel", no_wrap=True)
        for heading in ("registers", "spilled", "shared KiB", "threads", "per SM", "compile s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for record in records:
            if "error" in record:
                table.add_row(record["name"], "does not compile")
            first = True
            for kernel in record.get("kernels", ()):
                table.add_row(
                    record["name"] if first else "",
                    kernel["name"],
                    str(kernel["registers"]),
                    format_bytes(kernel["spill_stores"]) if kernel["spill_stores"] else "",
                    f"{kernel['shared'] / 1024:.1f}",
                    str(kernel["threads"]),
                    str(kernel["occupancy"]),
                    f"{record['compile_seconds']:.1f}" if first else "",
                )
                first = False
        self._console.print(table)
        self._console.print(
            "registers: of a thread; per SM: programs that a multiprocessor can hold at a time; "
            "compile s: of the variant's kernels together"
        )

    def print_programs(self, records: Sequence[dict[str, Any]]) -> None:
        """A line for each whole program."""
        if not records:
            return
        title = f"Programs of an 8B model, bfloat16, on {self._target.device_kind}"
        table = Table(title=title, title_justify="left")
        table.add_column("program", no_wrap=True)
        for heading in ("temporaries", "in place", "pool copied", "captured", "compile s"):
            table.add_column(heading, justify="right")
        for record in records:
            if "error" in record:
                table.add_row(record["name"], "does not compile")
                continue
            launches = record["pallas_launches"]
            table.add_row(
                record["name"],
                format_bytes(record["temporary_bytes"]),
                format_bytes(record["aliased_bytes"]),
                "YES" if record["pool_copies"] else "no",
                f"{record['captured_pallas_launches']} of {launches}" if launches else "no kernels",
                f"{record['compile_seconds']:.1f}",
            )
        self._console.print(table)
        self._console.print(
            "in place: bytes of arguments that results are written over, of each device; captured: "
            "kernel launches inside command buffers"
        )

    def print_folder(self, folder: Path) -> None:
        print_folder(self._console, folder)
