"""Training in blocks of steps, each a unit of the results, so that a run can be gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder

Blocks = Mapping[str, tuple[int, int]]
"""The first step of each, and the one behind its last, by the unit's name."""


def blocks_of(steps: int, size: int) -> Blocks:
    """So many steps in blocks of so many, the last of what is left."""
    ends = [min(begin + size, steps) for begin in range(0, steps, size)]
    return {f"step {end}": (begin, end) for begin, end in zip([0, *ends], ends, strict=False)}


def seconds_of_steps(folder: ResultFolder) -> float:
    """What all steps have taken, in this run and in those that it goes on with."""
    steps = [one["seconds"] for one in folder.finished.values() if one["kind"] == "steps"]
    return round(sum(steps), 3)


def run_blocks(
    folder: ResultFolder,
    blocks: Blocks,
    run: Callable[[int, int], Record],
    *,
    minutes: float | None,
) -> int:
    """All of the blocks that are not there, or as many as there are minutes for; returns the steps
    that are done."""
    done = 0
    for unit, (begin, end) in blocks.items():
        if unit not in folder.finished:
            if minutes is not None and seconds_of_steps(folder) >= 60 * minutes:
                break
            folder.finish_unit(unit, run(begin, end))
        done = end
    return done
