"""What `doctor` prints."""

from __future__ import annotations

from typing import Any

from experiments.harness.console import make_console
from experiments.harness.tables import Column, ResultTable, format_bytes, print_table, table_of

_TEXT = (Column("", numeric=False), Column("", numeric=False))


def print_findings(summary: dict[str, Any]) -> None:
    """A few tables, and the next command."""
    console = make_console()
    for table in (_machine(summary), _implementations(summary), _extras(summary)):
        print_table(console, table)
    command, why = summary["next"]
    console.print(f"next: {command}", markup=False, style="bold", soft_wrap=True)
    console.print(f"      ({why})", markup=False, soft_wrap=True)


def _machine(summary: dict[str, Any]) -> ResultTable:
    cache = summary["cache"]
    devices = [f"{one['platform']}:{one['id']} {one['kind']}" for one in summary["devices"]]
    versions = (f"{name} {one or 'missing'}" for name, one in summary["versions"].items())
    sections = (
        [("devices", ", ".join(devices) or "none")]
        + [(f"no {name}", why) for name, why in summary["problems"].items()],
        [
            ("CPUs", str(summary["cpu_count"])),
            ("memory", _of(summary["memory_free_bytes"], summary["memory_total_bytes"])),
            ("machine", summary["machine"]),
            ("Python", summary["python"]),
            ("versions", ", ".join(versions)),
            ("commit", summary["commit"] or "not a checkout"),
        ],
        [
            ("cache", cache["folder"]),
            ("models in it", format_bytes(cache["models_bytes"])),
            ("compiled programs in it", format_bytes(cache["compiled_bytes"])),
            ("disk free", format_bytes(cache["disk_free_bytes"])),
            ("SmolLM2", cache["smollm2"] or "not fetched yet"),
        ],
    )
    return table_of("This machine", _TEXT, *sections)


def _implementations(summary: dict[str, Any]) -> ResultTable:
    rows = [(name, why or "runs") for name, why in summary["implementations"].items()]
    return table_of("Attention implementations, the best first", _TEXT, rows)


def _extras(summary: dict[str, Any]) -> ResultTable:
    rows = [
        (name, f"missing: {', '.join(missing)}" if missing else "installed")
        for name, missing in summary["extras"].items()
    ]
    return table_of("Extras of this project: pip install -e '.[NAME]'", _TEXT, rows)


def _of(free: int | None, total: int | None) -> str:
    shown = ["unknown" if one is None else format_bytes(one) for one in (free, total)]
    return f"{shown[0]} free of {shown[1]}"
