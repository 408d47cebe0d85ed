"""Everything a run finds out, a line of JSON each, on disk at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from experiments.harness.results import ResultFolder

MEASURED, SKIPPED, ERROR = "measured", "skipped", "error"


class Record:
    """Writes and keeps the records of a run.

    Every record names its part, case and side, and has a status: `measured`, with a value and a
    unit; `skipped` or `error`, with a message.

    Args:
      folder: where they are written.
      marks: what every record says besides, such as that the run was a rehearsal.
      on_record: called with each one.
    """

    def __init__(
        self, folder: ResultFolder, marks: Mapping[str, Any] | None = None, on_record=lambda r: None
    ) -> None:
        self.part = ""
        self.records: list[dict[str, Any]] = []
        self._folder = folder
        self._marks = dict(marks or {})
        self._on_record = on_record

    def measured(self, case: str, side: str, value: Any, unit: str, **more: Any) -> None:
        self._write(case, side, MEASURED, {"value": value, "unit": unit, **more})

    def skipped(self, case: str, side: str, reason: str) -> None:
        self._write(case, side, SKIPPED, {"message": reason})

    def failed(self, case: str, side: str, error: BaseException | str, **more: Any) -> None:
        self._write(case, side, ERROR, {"message": describe_error(error), **more})

    def take_over(self, lines: list[dict[str, Any]]) -> None:
        """Records of an earlier run, which was broken off after this part."""
        self.records += lines

    def of(self, part: str, status: str = MEASURED) -> list[dict[str, Any]]:
        """The records so far of a part that have a status."""
        return [r for r in self.records if r["part"] == part and r["status"] == status]

    def has(self, side: str, message: str) -> bool:
        """Whether this part has said that of a side already."""
        return any(
            (r["part"], r["side"], r.get("message")) == (self.part, side, message)
            for r in self.records
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """How many records of each status each part has."""
        counts: dict[str, Counter] = {}
        for record in self.records:
            counts.setdefault(record["part"], Counter())[record["status"]] += 1
        return {part: dict(counter) for part, counter in counts.items()}

    def _write(self, case: str, side: str, status: str, fields: dict[str, Any]) -> None:
        start = {"part": self.part, "case": case, "side": side, "status": status}
        record = {"kind": "record", **start, **fields, **self._marks}
        self.records.append(record)
        self._folder.write_record(record, of_unit=self.part)
        self._on_record(record)


def describe_error(error: BaseException | str, most: int = 500) -> str:
    """An error in one line."""
    if isinstance(error, str):
        return error
    text = " ".join(str(error).split())[:most]
    return f"{type(error).__name__}: {text}"


def significant(value: float, digits: int = 4) -> float:
    """A number as precise as it deserves to be shown."""
    return float(f"{value:.{digits}g}")
