"""Minutes for a run, shared among its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

SHARES = {
    "target": 2,
    "correctness": 95,
    "tokens": 45,
    "command-buffers": 15,
    "floors": 8,
    "paper": 75,
    "trees": 120,
    "hydragen": 40,
    "decode": 80,
    "tune": 60,
}
"""Seconds that each part gets of a run of 8 minutes, in proportion; what one leaves over is for
those after it."""


class Budget:
    """How much time is left, to a part and to the run."""

    def __init__(
        self, seconds: float, parts: Sequence[str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds = seconds
        self._parts = list(parts)
        self._clock = clock
        self._start = clock()
        self._deadline = self._start + seconds

    @property
    def spent(self) -> float:
        return self._clock() - self._start

    def enter(self, part: str) -> None:
        """The time of `part` begins; it ends when its share and those before it are used up."""
        until = self._parts[: self._parts.index(part) + 1]
        share = sum(SHARES[name] for name in until) / sum(SHARES[name] for name in self._parts)
        self._deadline = self._start + self.seconds * share

    @property
    def left(self) -> float:
        """Seconds left to the part."""
        return self._deadline - self._clock()

    def lacks(self, seconds: float) -> str | None:
        """Why something that takes `seconds` is not begun any more, or None if it may be."""
        if self.left >= seconds:
            return None
        return (
            f"no time: it needs about {seconds:.0f} s, and {max(0, self.left):.0f} s are left "
            "to this part; give more --minutes or fewer parts"
        )
