"""Where a training stands, in files beside its results: what going on with it needs."""

from __future__ import annotations

from pathlib import Path


class StateFiles:
    """One file for each step that was saved, until a later one is there."""

    def __init__(self, folder: Path, name: str = "state") -> None:
        """Those of one training; `name` tells them from those of another."""
        self._folder = folder
        self._name = name

    def path(self, step: int) -> Path:
        """Of the state after so many steps."""
        return self._folder / f"{self._name}-{step:06}.npz"

    def keep(self, *steps: int) -> None:
        """Delete all but those of these steps."""
        kept = {self.path(step) for step in steps}
        for path in {*self._folder.glob(f"{self._name}-*.npz")} - kept:
            path.unlink()
