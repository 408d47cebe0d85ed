"""Measuring one unit after another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from experiments.harness.progress import phase_display
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder

Units = Mapping[str, Callable[[], Record]]
"""What measures each unit, by its name; each returns JSON values with a `kind`."""


def measure_units(folder: ResultFolder, units: Units, phase: str) -> list[Record]:
    """The line of every unit, in order; those that `folder` has already are not measured again.

    Shows `phase` with a bar and the time left.
    """
    tell_taken_over(folder, units)
    records = []
    with phase_display() as display:
        for done, (unit, measure) in enumerate(units.items()):
            display.update(phase, done, len(units), detail=unit)
            if unit in folder.finished:
                records.append(folder.finished[unit])
            else:
                records.append(folder.finish_unit(unit, measure()))
    return records


def tell_taken_over(folder: ResultFolder, units: Mapping[str, object]) -> None:
    """Say on standard error that an earlier run is gone on with, if one is."""
    there = sum(unit in folder.finished for unit in units)
    if there:
        print(
            f"going on in {folder.path}, where {there} of {len(units)} are measured "
            "(--fresh begins anew)",
            file=sys.stderr,
        )
