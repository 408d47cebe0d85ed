"""The folder a run leaves behind: `results.jsonl`, `summary.json`, `picture.png`."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from experiments.harness.errors import UserError


class ResultFolder:
    """A folder for one run's results; each record is on disk as soon as it is written.

    Used as a context manager; a folder made for a run that wrote nothing is removed at the end. A
    `KeyboardInterrupt` that ends the block leaves it with `state()` as its message.

    Raises:
        UserError: the folder cannot be made or written, or holds the results of an earlier run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: TextIO | None = None
        self._count = 0
        self._made_here = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UserError(
                f"output folder {path} cannot be written ({error.strerror or error}); "
                "choose another with --output"
            ) from error
        if self.results_path.exists():
            raise UserError(
                f"output folder {path} holds the results of an earlier run; "
                "choose another with --output, or remove it"
            )

    @property
    def results_path(self) -> Path:
        return self.path / "results.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def picture_path(self) -> Path:
        return self.path / "picture.png"

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Append one line to `results.jsonl` and flush it."""
        if self._records is None:
            self._records = self.results_path.open("w", encoding="utf-8")
        self._records.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._records.flush()
        self._count += 1

    def state(self) -> str:
        """Where the results so far are, in words."""
        if self._count == 0:
            return "no results were written"
        return f"the results so far ({self._count} lines) are in {self.results_path}"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        self.summary_path.write_text(text, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._records is not None:
            self._records.close()
        if self._made_here:
            with suppress(OSError):  # it holds something
                self.path.rmdir()
        if isinstance(error, KeyboardInterrupt):
            error.args = (self.state(),)


def config_record(config: Any) -> dict[str, Any]:
    """The fields of a subcommand's config as JSON values: paths become text."""
    return {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in dataclasses.asdict(config).items()
    }


def new_run_path(experiment: str, parent: Path = Path("runs")) -> Path:
    """A path in `parent` that no earlier run has, named by the experiment and the local time."""
    stem = f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    path = parent / stem
    count = 1
    while path.exists():
        count += 1
        path = parent / f"{stem}-{count}"
    return path
