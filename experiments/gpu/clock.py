"""Timing programs of which each call does many equal steps, several sides in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Side:
    """Something to time.

    Attributes:
      call: starts the program and returns its result, not waited for; `call(i)` is the i-th.
      steps: what one call does, so many times.
    """

    call: Callable[[int], Any]
    steps: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
      least, most: of the repeats.
      steps: of a repeat.
    """

    median: float
    least: float
    most: float
    repeats: int
    steps: int

    def microseconds(self) -> dict[str, float]:
        values = {"value": self.median, "least": self.least, "most": self.most}
        return {name: float(f"{1e6 * value:.5g}") for name, value in values.items()}


def time_sides(
    sides: Mapping[str, Side],
    *,
    seconds: float,
    repeats: int,
    seed: int = 0,
    on_error: Callable[[str, Exception], None],
) -> dict[str, Timing]:
    """Times the sides in turns, in an order that changes each round.

    A repeat is as many calls as take about `seconds`, started one after another and waited for
    once, so that what the host takes to start a call is hidden behind the call before it.
    A side that fails is told and left out.
    """
    calls: dict[str, int] = {}
    taken: dict[str, list[float]] = {}
    for name, side in sides.items():
        try:
            _run(side, 1)  # loads the program
            once = _run(side, 1)
            calls[name] = max(1, min(10_000, round(seconds / max(once, 1e-7))))
            if calls[name] > 1:
                # Waiting for one call is a good part of it where it is short: look again.
                several = _run(side, min(calls[name], 8)) / min(calls[name], 8)
                calls[name] = max(1, min(10_000, round(seconds / max(several, 1e-7))))
            taken[name] = []
        except Exception as error:
            on_error(name, error)
    random = np.random.default_rng(seed)
    for _ in range(repeats):
        names = list(taken)
        for index in random.permutation(len(names)):
            name = names[index]
            try:
                taken[name].append(_run(sides[name], calls[name]))
            except Exception as error:
                del taken[name]
                on_error(name, error)
    return {
        name: _timing(seconds_each, calls[name] * sides[name].steps)
        for name, seconds_each in taken.items()
        if seconds_each
    }


def _run(side: Side, calls: int) -> float:
    begin = time.perf_counter()
    result = None
    for index in range(calls):
        result = side.call(index)
    jax.block_until_ready(result)
    return time.perf_counter() - begin


def _timing(seconds: list[float], steps: int) -> Timing:
    each = np.asarray(seconds) / steps
    return Timing(float(np.median(each)), float(each.min()), float(each.max()), len(each), steps)
