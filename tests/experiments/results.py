"""Made-up results, and what the views make of them as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.reading import Result, read_result
from experiments.harness.tables import ResultTable, to_markdown

ENVIRONMENT = {
    "device": "cpu",
    "device_count": 1,
    "cpu_count": 2,
    "machine": "Linux",
    "python": "3.11.0",
    "versions": {"jax": "1.2.3", "flax": None},
    "commit": "abc",
    "command": ["python", "-m", "experiments", "x"],
}


def make_result(
    experiment: str,
    lines: Sequence[dict[str, Any]] = (),
    summary: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Result:
    header = {"experiment": experiment, "config": config or {}, "environment": ENVIRONMENT}
    return Result(Path("runs/x"), header, list(lines), summary)


def text_of(tables: Sequence[ResultTable]) -> str:
    return "\n".join(map(to_markdown, tables))


def lines_in(folder: Path) -> list[dict[str, Any]]:
    """Every line of `results.jsonl`, the header first."""
    return [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]


def summary_in(folder: Path) -> dict[str, Any]:
    summary = read_result(folder).summary
    assert summary is not None
    return summary
