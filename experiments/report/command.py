"""`python -m experiments report`: a page with the tables and pictures of results.

Takes folders that experiments left, or folders that hold such folders, and writes `report.md` with
each result's tables, its pictures (PNG on the page, SVG beside them), and the command, device,
versions and commit behind them. Nothing is measured, and no device is needed.

    python -m experiments report runs
    python -m experiments report experiments/results/cpu-2026-11-21 --output page
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Command
from experiments.harness.errors import UserError
from experiments.report.config import ReportConfig


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
