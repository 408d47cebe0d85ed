"""From a command line to a config: options, files of options, and earlier results.

Files and earlier results become options that stand before those typed, so that everything goes
through one parser, and what is typed wins.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from experiments.harness.errors import UserError
from experiments.harness.inputs import changed_since
from experiments.harness.json_text import is_half_a_pair
from experiments.harness.options import boolean_option, option
from experiments.harness.reading import SWEEP, read_result
from experiments.harness.results import config_record

C = TypeVar("C")
_OWN = ("output",)  # of one run: never taken from a file or an earlier result


@dataclass(frozen=True)
class ShowOptions:
    """How a command tells what it found."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON, and nothing for people."""


@dataclass(frozen=True)
class RunOptions(ShowOptions):
    """What every experiment that leaves a folder of results understands."""

    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run in seconds, to see that it works; other options still count."""

    config: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")
    ] = None
    """Take options from a TOML file: `repeats = 3`, a line each."""

    from_: Annotated[
        Path | None,
        tyro.conf.arg(name="from", metavar="RESULT", help_behavior_hint="(default: none)"),
    ] = None
    """Repeat the run that left this folder; other options still count."""

    sweep: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="OPTION=A,B,C")
    ] = ()
    """Run once for each value; given twice, for each pair of values."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Begin anew, even where the same command was broken off."""


@dataclass(frozen=True)
class Running(Generic[C]):
    """An experiment, and how it is to be run."""

    experiment: C
    run: RunOptions


@dataclass(frozen=True)
class Showing(Generic[C]):
    """A command that leaves no results."""

    experiment: C
    run: ShowOptions


def check_texts(arguments: Sequence[str]) -> None:
    """Raise `UserError` for what was typed, or is in a file of options, and is no text.

    A path of other bytes than UTF-8 (in Python, with half surrogate pairs) could stand in no
    result, page or table; nor does any system take paths with a zero byte.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "\0" in argument or is_half_a_pair(argument):
            named = before.startswith("--") and "=" not in before and not argument.startswith("--")
            shown = f"{before} {_in_bytes(argument)}" if named else _in_bytes(argument)
            encoding = sys.getfilesystemencoding().upper()
            what = "it has a zero byte" if "\0" in argument else f"it is no text in {encoding}"
            raise UserError(f"{shown} cannot be used: {what}")


def _in_bytes(argument: str) -> str:
    """With `\\xff` for a byte that is no text, and what else is not shown escaped as well."""
    bytes_shown = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) & 0xFF:x}", argument)
    return bytes_shown.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def expand(config_class: Any, name: str, arguments: Sequence[str]) -> list[str]:
    """The options that `--from`, `--smoke` and `--config` stand for, then `arguments`.

    Raises:
      UserError: a file that cannot be read, holds no options of this experiment, or is the result
        of another.
    """
    expanded: list[str] = []
    for earlier in _values_of("--from", arguments):
        result = read_result(Path(earlier))
        if result.experiment == SWEEP:
            raise UserError(f"--from {earlier} is a sweep: name the folder of one of its points")
        if result.experiment != name:
            raise UserError(
                f"--from {earlier} is a result of {result.experiment}: "
                f"python -m experiments {result.experiment} --from {earlier}"
            )
        expanded += as_arguments(config_class, result.config, f"--from {earlier}")
    if "--smoke" in arguments:
        expanded += as_arguments(config_class, config_class.SMOKE, "--smoke")
    for file in _values_of("--config", arguments):
        options = read_toml(Path(file))
        for name in _OWN:
            if name in options:
                raise UserError(f"--config {file}: {name} is of one run; type {option(name)}")
        expanded += as_arguments(config_class, options, f"--config {file}")
    return [*expanded, *arguments]


def tell_changes(config: Any, arguments: Sequence[str]) -> None:
    """Say on standard error what a run that is repeated by `--from` read, and has changed since."""
    for earlier in _values_of("--from", arguments):
        result = read_result(Path(earlier))
        record = config_record(config)
        fields = [name for name in record if result.config.get(name) == record[name]]
        for name in changed_since(result.header.get("inputs", {}), config, fields):
            print(f"{name} is not what it was for {earlier}", file=sys.stderr)


def read_toml(path: Path) -> dict[str, Any]:
    """Options of a TOML file, with dashes or underscores in their names."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise UserError(f"--config {path} is not TOML: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def as_arguments(config_class: Any, values: Mapping[str, Any], source: str) -> list[str]:
    """Options that set the fields of a config to `values`; `source` is named in errors."""
    known = {field.name for field in dataclasses.fields(config_class)}
    arguments: list[str] = []
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{source}: unknown option {name!r}; known: {', '.join(sorted(known))}")
        if name not in _OWN:
            arguments += _as_option(name, value, source)
    return arguments


def _as_option(name: str, value: Any, source: str) -> list[str]:
    match value:
        case bool():
            return [boolean_option(name, value)]
        case list() | tuple():
            return [option(name), *map(str, value)]
        case int() | float() | str():
            return [f"{option(name)}={value}"]
        case None:
            return [f"{option(name)}=None"]
        case _:
            raise UserError(
                f"{source}: {name} must be a text, a number, true, false or a list, "
                f"got {json.dumps(value, default=str)}"
            )


def without_option(name: str, arguments: Sequence[str]) -> list[str]:
    """`arguments` without an option and its value, wherever it stands."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == name:
            skip = True
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def _values_of(name: str, arguments: Sequence[str]) -> list[str]:
    """The values of an option, each time it is given with one."""
    values = []
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == name and following is not None:
            values.append(following)
        elif argument.startswith(f"{name}="):
            values.append(argument.removeprefix(f"{name}="))
    return values
