"""The folder that a run writes its results into, and going on with one that was broken off.

See `experiments.harness.reading` for what is in it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from experiments.harness.errors import UserError
from experiments.harness.inputs import NO_FILE, check_unchanged, inputs_of
from experiments.harness.json_text import as_read, to_json
from experiments.harness.reading import (
    HEADER,
    RESULTS,
    SCHEMA,
    SUMMARY,
    SWEEP,
    Record,
    Result,
    has_points,
    read_result,
)

SAME_HOST = ("python", "versions", "settings", "cpu_count", "commit")
"""What a run must have in common with one that it goes on with, besides the device."""

_NOT_PART = ("output",)  # of what makes two configs the same
_SAME_WHERE = ("device", "device_count", "torch", *SAME_HOST)


class ResultFolder:
    """A folder for one run's results; each line is on disk as soon as it is written.

    Used as a context manager; a folder made for a run that wrote nothing but its header is removed
    at the end. A `KeyboardInterrupt` that ends the block leaves it with `state()` as its message.
    Until the end no other run can have the folder.

    Attributes:
      finished: the line that ended each unit so far, or in an earlier run that is gone on with.
    """

    def __init__(
        self,
        path: Path,
        experiment: str,
        config: Any,
        inputs: Mapping[str, str] | None = None,
        *,
        new: bool = False,
    ) -> None:
        """Takes over an unfinished run of the same config and inputs that `path` holds.

        Args:
            inputs: what the run reads, as `inputs_of` tells it of the config by default.
            new: the folder must not be there yet.

        Raises:
            UserError: the folder cannot be made or written, holds another run's results, is where
                another run is writing, or a file that the run reads cannot be read.
            models.DownloadError: its model cannot be fetched.
            FileExistsError: with `new`.
        """
        self.path = path
        self.experiment = experiment
        self.config = config_record(config)
        self.finished: dict[str, Record] = {}
        self._given = config
        self._earlier: Result | None = None
        self._records: TextIO | None = None
        self._count = 0
        try:
            self._made_here = not path.exists()
            path.mkdir(parents=True, exist_ok=not new)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            if new and isinstance(error, FileExistsError):
                raise
            raise UserError(
                f"output folder {path} cannot be written ({error.strerror or error}); "
                "choose another with --output"
            ) from error
        self._lock = lock_folder(path)
        try:
            self.inputs = dict(inputs_of(config) if inputs is None else inputs)
            if self.results_path.exists() and b"\n" in self.results_path.read_bytes():
                self._take_over()  # else it was broken off before its first line was written
        except BaseException:
            self._leave()
            raise

    @property
    def results_path(self) -> Path:
        return self.path / RESULTS

    @property
    def summary_path(self) -> Path:
        return self.path / SUMMARY

    def begin(self, environment: Mapping[str, Any], **setting: Any) -> None:
        """Write the header, with what the config does not tell; first of all that is written.

        Raises:
            UserError: the run that is gone on with was on another device, version, setting or
                commit; or what was loaded meanwhile is not what it was when the folder was opened.
        """
        check_unchanged(self.inputs, self._given)
        header = {
            "kind": HEADER,
            "schema": SCHEMA,
            "experiment": self.experiment,
            "config": self.config,
            "inputs": self.inputs,
            **setting,
            "date": date.today().isoformat(),
            "environment": dict(environment),
        }
        if self._earlier is None:
            self._records = self.results_path.open("w", encoding="utf-8")
            self._write_line(header)
            return
        before = self._earlier.environment
        for name in _SAME_WHERE:
            if before.get(name) != environment.get(name):
                raise UserError(
                    f"{self.path} was begun with {name} {before.get(name)}, and now it is "
                    f"{environment.get(name)}: choose another folder with --output, or --fresh"
                )
        self._rewrite([self._earlier.header, *self._lines_kept(self._earlier)])

    def write_record(self, record: Mapping[str, Any], of_unit: str | None = None) -> None:
        """Append one line and flush it; it belongs to the unit, if one is named."""
        self._write_line(dict(record) if of_unit is None else {**record, "of_unit": of_unit})
        self._count += 1

    def finish_unit(self, unit: str, record: Mapping[str, Any]) -> Record:
        """Append the line that ends `unit`; returns it as it will be read."""
        line = {"kind": record["kind"], "unit": unit, **record}
        self._write_line(line)
        self._count += 1
        self.finished[unit] = as_read(line)
        return self.finished[unit]

    def lines_of(self, unit: str) -> list[Record]:
        """The lines that belong to a unit of `finished`."""
        assert self._earlier is not None
        return [line for line in self._earlier.lines if line.get("of_unit") == unit]

    def state(self) -> str:
        """Where the results so far are, in words."""
        if self.summary_path.exists():
            return f"the run has ended, and its results are in {self.path}"
        if self._count == 0:
            return "no results were written"
        goes_on = "; the same command goes on from there" if self.finished else ""
        return f"the results so far ({self._count} lines) are in {self.results_path}{goes_on}"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The run has ended."""
        _replace(self.summary_path, to_json(summary, indent=2) + "\n")

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
            if self._count == 0 and not (self.summary_path.exists() or self._has_points()):
                self.results_path.unlink()
        self._leave()
        told_within = self._count == 0 and self._has_points()
        if isinstance(error, KeyboardInterrupt) and not told_within:
            error.args = (self.state(),)

    def _leave(self) -> None:
        if self._made_here:
            with suppress(OSError):  # it holds something
                self.path.rmdir()
        os.close(self._lock)

    def _has_points(self) -> bool:
        return self.experiment == SWEEP and has_points(self.path)

    def _take_over(self) -> None:
        earlier = read_result(self.path)
        if earlier.summary is not None:
            raise UserError(
                f"output folder {self.path} holds the results of an earlier run, which has ended; "
                "choose another with --output, or remove it"
            )
        if earlier.experiment != self.experiment or _differs(earlier.config, self.config):
            raise UserError(
                f"output folder {self.path} holds the results of a run with other options "
                f"({_difference(earlier, self)}); choose another with --output, or remove it"
            )
        if changed := _differs(earlier.header.get("inputs", {}), self.inputs):
            raise UserError(
                f"output folder {self.path} holds results of {changed[0]} as it was then, and it "
                "has changed; choose another with --output, or remove it"
            )
        if gone := [name for name, what in self.inputs.items() if what == NO_FILE]:
            raise UserError(
                f"output folder {self.path} holds results of what {gone[0]} gave then, which is no "
                "file: nobody can tell whether it gives the same; choose another with --output"
            )
        self._earlier = earlier
        self.finished = earlier.finished

    def _lines_kept(self, earlier: Result) -> list[Record]:
        """Lines of no unit are written again by the run that goes on."""
        return [line for line in earlier.lines if "unit" in line or "of_unit" in line]

    def _rewrite(self, lines: list[Record]) -> None:
        _replace(self.results_path, "".join(map(_as_line, lines)))
        self._records = self.results_path.open("a", encoding="utf-8")
        self._count = len(lines) - 1

    def _write_line(self, record: Mapping[str, Any]) -> None:
        assert self._records is not None, "begin() comes first"
        self._records.write(_as_line(record))
        self._records.flush()


def lock_folder(path: Path) -> int:
    """Keeps other runs out of a folder until what this returns is closed, or the process ends."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(
            f"a run is writing to output folder {path}; choose another with --output"
        ) from None
    except OSError:
        pass  # a file system without locks: nothing is known of other runs
    return folder


def config_record(config: Any) -> Record:
    """The fields of a subcommand's config as JSON values: paths become text, tuples lists."""
    record = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return as_read(record)


def _differs(one: Record, other: Record) -> list[str]:
    names = [name for name in {**one, **other} if name not in _NOT_PART]
    return [name for name in names if one.get(name) != other.get(name)]


def _difference(earlier: Result, folder: ResultFolder) -> str:
    if earlier.experiment != folder.experiment:
        return f"of {earlier.experiment}"
    name = _differs(earlier.config, folder.config)[0]
    return f"{name}: {earlier.config.get(name)}, now {folder.config.get(name)}"


def _as_line(record: Mapping[str, Any]) -> str:
    return to_json(record) + "\n"


def _replace(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process is killed."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
