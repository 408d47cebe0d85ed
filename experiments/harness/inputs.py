"""What a run reads: its files and its model, told apart by what is in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.digests import digest
from experiments.harness.errors import UserError
from experiments.loading import model_inputs

NO_FILE = "not a file"
"""What stands for a pipe, say: what came out of it is gone."""


def inputs_of(config: Any, fields: Sequence[str] | None = None) -> dict[str, str]:
    """What tells each file and model that a config names from any other, by its name.

    Files have their digest, models of the hub their commit, which is what all of them are fetched
    for. Random models have none: config and commit tell all.

    Args:
        fields: those of the config that are looked at; None is all.

    Raises:
        UserError: a file cannot be read.
        models.DownloadError: a model cannot be fetched.
    """
    inputs: dict[str, str] = {}
    for name in [field.name for field in dataclasses.fields(config)] if fields is None else fields:
        value = getattr(config, name)
        try:
            if name == "model" and isinstance(value, str):
                inputs |= model_inputs(value)
            for path in _paths_in(name, value):
                if path.exists() and not path.is_dir():
                    inputs[str(path)] = digest(path) if path.is_file() else NO_FILE
        except OSError as error:
            where = error.filename or value
            raise UserError(f"{where} cannot be read ({error.strerror or error})") from error
    return inputs


def _paths_in(name: str, value: Any) -> list[Path]:
    """What a field names that may be a file: any path, and codecs that may be a name too; of the
    folders of head patterns and of learned prefixes those of theirs."""
    if name == "heads" and isinstance(value, Path):
        from models.head_patterns import pattern_files

        return list(pattern_files(value))
    if name == "prefix" and isinstance(value, Path):
        from models.prefixes import prefix_files

        return list(prefix_files(value))
    if name != "codec":
        return [value] if isinstance(value, Path) else []
    return [Path(one) for one in ((value,) if isinstance(value, str) else value)]


def check_unchanged(inputs: Mapping[str, str], config: Any) -> None:
    """Raise `UserError` if what `config` names is no longer what it was when a run began."""
    for name, now in inputs_of(config).items():
        if inputs.get(name) != now:
            raise UserError(
                f"{name} has changed since this run began, whose results would be of two; give the "
                "same command again to begin with what is there now"
            )


def changed_since(then: Mapping[str, str], config: Any, fields: Sequence[str]) -> list[str]:
    """Those of the inputs that `fields` of a config name which an earlier run had otherwise.

    A file that is new, or gone, beside others that the run had, counts; of a run that did not tell
    a field's inputs nothing is known.
    """
    changed = []
    for field in fields:
        now = inputs_of(config, [field])
        folders = {Path(name).parent for name in now}
        known = {
            name: what for name, what in then.items() if name in now or Path(name).parent in folders
        }
        if known:
            changed += [name for name in {**known, **now} if known.get(name) != now.get(name)]
    return changed
