"""Which folder a run writes into: a new one, or that of a run which was broken off."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.harness.errors import UserError
from experiments.harness.reading import RESULTS, SUMMARY, SWEEP, has_points, read_result
from experiments.harness.results import SAME_HOST, ResultFolder, lock_folder

RUNS = Path("runs")


def open_results(
    experiment: str,
    config: Any,
    default: Path | None = None,
    inputs: Mapping[str, str] | None = None,
) -> ResultFolder:
    """The folder that `config.output` names, or `default`, or one in `runs`.

    There, an unfinished run of the same config and `inputs` on the same versions and commit is gone
    on with, the latest of them.

    Raises:
        UserError: as `ResultFolder`.
    """
    chosen = config.output or default
    if chosen is not None:
        return ResultFolder(chosen, experiment, config, inputs)
    for path in _unfinished(experiment):
        with suppress(UserError):  # it has another config, cannot be read, or is still going on
            return ResultFolder(path, experiment, config, inputs)
    while True:
        with suppress(FileExistsError):  # a run that began in the same second was quicker
            return ResultFolder(new_run_path(experiment), experiment, config, inputs, new=True)


def begin_anew(path: Path) -> None:
    """Remove the lines that a run which has not ended left in `path`, and its points' in a sweep.

    Whatever else `path` holds is left for `ResultFolder` to refuse.

    Raises:
        UserError: another run is writing there.
    """
    try:
        earlier = read_result(path)
    except UserError:
        return
    if earlier.summary is not None:
        return
    lock = lock_folder(path)
    try:
        (path / RESULTS).unlink()
        if earlier.experiment == SWEEP:
            for file in (*path.glob(f"*/{RESULTS}"), *path.glob(f"*/{SUMMARY}")):
                file.unlink()
    finally:
        os.close(lock)


def _unfinished(experiment: str) -> Iterator[Path]:
    """Runs in `runs` that were broken off where this one would take place, the latest first."""
    broken_off = [
        path
        for path in sorted(RUNS.glob(f"{experiment}-*"), reverse=True)
        if (path / RESULTS).exists() and not (path / SUMMARY).exists()
    ]
    if not broken_off:
        return
    from experiments.harness.environment import describe_host

    host = describe_host()
    if "+" in (host["commit"] or ""):  # nobody knows what has changed since
        return
    for path in broken_off:
        with suppress(UserError):
            result = read_result(path)
            same = all(result.environment.get(name) == host.get(name) for name in SAME_HOST)
            if same and (result.finished or (experiment == SWEEP and has_points(path))):
                yield path


def new_run_path(experiment: str, parent: Path = RUNS) -> Path:
    """A path in `parent` that no earlier run has, named by the experiment and the local time."""
    stem = f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    path = parent / stem
    count = 1
    while path.exists():
        count += 1
        path = parent / f"{stem}-{count}"
    return path
