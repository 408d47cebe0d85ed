"""`python -m experiments report`: a page with the tables and pictures of results.

Takes folders that experiments left, or folders that hold such folders, and writes `report.md` with
each result's tables, its pictures (PNG on the page, SVG beside them), and the command, device,
versions and commit behind them. Nothing is measured, and no device is needed.

    python -m experiments report runs
    python -m experiments report experiments/results/cpu-2026-11-21 --output page
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.harness.commands import Command
from experiments.harness.errors import UserError
from experiments.harness.options import by_default


@dataclass(frozen=True)
class ReportConfig:
    """Write a Markdown page with the tables and pictures of results."""

    results: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER...")]
    """Result folders, or folders that hold some."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/report-TIME")] = None
    """Folder for the page and its pictures; an earlier page there is replaced."""

    title: str = "Results"
    """Heading of the page."""


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the page and return where it is.

    Raises:
        UserError: no result is found, or one cannot be read.
    """
    if not config.results:
        raise UserError("name a result folder, or a folder that holds some: report runs")
    from experiments.report.page import write_page

    return write_page(config)


REPORT = Command("report", ReportConfig, run)
