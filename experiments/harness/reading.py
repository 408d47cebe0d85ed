"""What is in the folder that a run leaves behind.

`results.jsonl` holds JSON lines, each with a `kind`. The first is the header, of kind `run`: the
schema's version, the experiment, its whole config, in `inputs` what tells its files and its model
from any other (`harness.inputs`), and the environment. What a run measures comes in units (a case,
a point, a side in a round). A line that ends a unit names it in `unit`; lines that belong to a unit
name it in `of_unit`, and count only once it has ended. `summary.json` is there when the run has
ended. How numbers that are not finite stand in both, `harness.json_text` says.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.harness.errors import UserError
from experiments.harness.json_text import from_json

SCHEMA = 1
RESULTS, SUMMARY = "results.jsonl", "summary.json"
HEADER = "run"
SWEEP = "sweep"  # the experiment whose points are runs in folders within its own
_HEADED = {"experiment", "config", "environment", "date"}

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What is in a result folder.

    Attributes:
      lines: of finished units, and those of none, without the header.
      summary: None when the run has not ended.
    """

    path: Path
    header: Record
    lines: list[Record]
    summary: Record | None

    @property
    def experiment(self) -> str:
        return self.header["experiment"]

    @property
    def config(self) -> Record:
        return self.header["config"]

    @property
    def environment(self) -> Record:
        return self.header["environment"]

    def of_kind(self, kind: str) -> list[Record]:
        """Lines of that kind, in the order they were written."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def finished(self) -> dict[str, Record]:
        """The line that ended each unit, by the unit."""
        return {line["unit"]: line for line in self.lines if "unit" in line}


def folder_of(path: Path) -> Path:
    """The result folder that `path` names, itself or by a file that every one has."""
    return path.parent if path.name in (RESULTS, SUMMARY) else path


def read_result(path: Path) -> Result:
    """The result in a folder; its `results.jsonl` or `summary.json` may be named instead.

    A last line that was cut off, and lines of units that have not ended, are left out.

    Raises:
        UserError: there is no result, or it is none that this version reads.
    """
    folder = folder_of(path)
    file = folder / RESULTS
    try:
        text = file.read_text(encoding="utf-8")
        summary = folder / SUMMARY
        ended = from_json(summary.read_text(encoding="utf-8")) if summary.exists() else None
        header, *lines = _whole_lines(text)
    except OSError as error:
        raise UserError(
            f"{path} holds no result: {file} cannot be read ({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} holds no result that can be read: {error}") from error
    if header.get("kind") != HEADER or header.get("schema") != SCHEMA or _HEADED - set(header):
        raise UserError(
            f"{file} does not begin with a header of schema {SCHEMA}: "
            "it was not written by this version"
        )
    finished = {line["unit"] for line in lines if "unit" in line}
    kept = [line for line in lines if line.get("of_unit") is None or line["of_unit"] in finished]
    return Result(folder, header, kept, ended)


def has_points(path: Path) -> bool:
    """Whether a point of the sweep in that folder has written a line."""
    return any(file.stat().st_size > 0 for file in path.glob(f"*/{RESULTS}"))


def _whole_lines(text: str) -> list[Record]:
    *whole, cut_off = text.split("\n")
    del cut_off  # empty, but for a run that was killed while writing
    lines = [from_json(line) for line in whole]
    if not lines or not all(isinstance(line, dict) and "kind" in line for line in lines):
        raise ValueError(f"{RESULTS} holds other than JSON objects with a kind")
    return lines
