"""Where a training stands, in files beside its results: what going on with it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from experiments.harness.errors import UserError

State = TypeVar("State")


class StateFiles:
    """One file for each step that was saved, until a later one is there."""

    def __init__(self, folder: Path, name: str = "state") -> None:
        """Those of one training; `name` tells them from those of another."""
        self._folder = folder
        self._name = name

    def path(self, step: int) -> Path:
        """Of the state after so many steps."""
        return self._folder / f"{self._name}-{step:06}.npz"

    def restore(
        self, step: int, read: Callable[[Path], State], *, unreadable: type[Exception]
    ) -> State:
        """What `read` makes of the file of a step.

        Raises:
            UserError: `read` raised `unreadable`.
        """
        try:
            return read(self.path(step))
        except unreadable as error:
            raise UserError(f"{error}; begin anew with --fresh") from error

    def keep(self, *steps: int) -> None:
        """Delete all but those of these steps."""
        kept = {self.path(step) for step in steps}
        for path in {*self._folder.glob(f"{self._name}-*.npz")} - kept:
            path.unlink()
