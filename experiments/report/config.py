"""The options of `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

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
