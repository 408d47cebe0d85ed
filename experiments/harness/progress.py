"""Progress of a run's phases on standard error; silent where that is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class PhaseDisplay:
    """One line for each phase: a spinner until its total is known, then a bar and the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, phase: str, done: int = 0, total: int | None = None, detail: str = "") -> None:
        """Show that `phase` has done `done` of `total`; a new phase gets a new line.

        `detail` says what is being done of it.
        """
        if phase not in self._tasks:
            self._finish_all()
            self._tasks[phase] = self._progress.add_task(phase, total=total, detail=detail)
        self._progress.update(self._tasks[phase], completed=done, total=total, detail=detail)

    def _finish_all(self) -> None:
        for task in self._progress.tasks:
            if not task.finished:
                total = task.total if task.total is not None else 1
                self._progress.update(task.id, completed=total, total=total, detail="")


@contextmanager
def phase_display() -> Iterator[PhaseDisplay]:
    """Show phases while the block runs; the terminal is restored however it ends."""
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[detail]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield PhaseDisplay(progress)
