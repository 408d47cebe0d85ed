"""All sides, once or in several rounds, so that what else the machine does hits each alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from experiments.harness.progress import PhaseDisplay
from experiments.harness.results import ResultFolder
from experiments.harness.units import tell_taken_over
from experiments.serve.config import ServeConfig, Side
from experiments.serve.ideal import ideal_hits
from experiments.serve.measures import (
    ratios,
    request_record,
    served_of,
    side_record,
    spread,
)
from experiments.serve.replay import Served
from experiments.serve.sides import run_side, warm_up
from experiments.serve.workload import Workload
from jax_chunkattn import CacheConfig
from models import LoadedModel


class SideRun(NamedTuple):
    """One side in one round: its record, and its requests."""

    record: dict[str, Any]
    served: tuple[Served, ...]


class Rounds:
    """Runs the sides and writes their records as they come.

    Attributes:
      base: the side that ratios are to.
    """

    def __init__(
        self,
        config: ServeConfig,
        loaded: LoadedModel,
        workload: Workload,
        cache: CacheConfig,
        folder: ResultFolder,
        display: PhaseDisplay,
    ) -> None:
        sides = config.sides
        self.base: Side = "unshared" if "unshared" in sides else sides[-1]
        self._config = config
        self._given = (config, loaded, workload, cache)
        self._num_requests = len(workload.requests)
        prompts = [request.prompt for request in workload.requests]
        self._ideal = ideal_hits(prompts, cache.chunk_size)
        self._folder = folder
        self._display = display
        self._answers: list[tuple[int, ...]] | None = None
        self._runs: dict[Side, list[SideRun]] = {side: [] for side in sides}
        self._warm: set[Side] = set()

    def run(self) -> None:
        """Every side in every round, in an order that changes."""
        sides, rounds = self._config.sides, range(self._config.rounds)
        turns: list[tuple[Side, int]] = [
            (side, number)
            for number in rounds
            for side in (*sides[number % len(sides) :], *sides[: number % len(sides)])
        ]
        tell_taken_over(self._folder, {self._unit(*turn): turn for turn in turns})
        for side, number in turns:
            run = self._take_over(side, number) or self._run_side(side, number)
            self._answers = self._answers or [one.tokens for one in run.served]
            self._runs[side].append(run)

    def typical(self, side: Side) -> SideRun:
        """The side's round with the median latency (of two, the better one)."""
        runs = sorted(self._runs[side], key=lambda run: run.record["normalised_latency"]["mean"])
        return runs[(len(runs) - 1) // 2]

    def ratios(self, side: Side) -> dict[str, dict[str, float] | None]:
        """The side's numbers over those of `base` in the same round: median, least, most."""
        pairs = zip(self._runs[side], self._runs[self.base], strict=True)
        return spread([ratios(mine.record, other.record) for mine, other in pairs])

    def _take_over(self, side: Side, number: int) -> SideRun | None:
        """What an earlier run, which was broken off, has measured of it."""
        unit = self._unit(side, number)
        if unit not in self._folder.finished:
            return None
        lines = sorted(self._folder.lines_of(unit), key=lambda line: line["index"])
        return SideRun(self._folder.finished[unit], tuple(map(served_of, lines)))

    def _run_side(self, side: Side, number: int) -> SideRun:
        unit = self._unit(side, number)
        if side not in self._warm:
            self._display.update(f"{unit}: warm-up")
            warm_up(side, *self._given)
            self._warm.add(side)
        replayed = run_side(
            side,
            *self._given,
            on_served=lambda served: self._folder.write_record(
                request_record(side, number, served), of_unit=unit
            ),
            on_turn=lambda done: self._display.update(unit, done, self._num_requests),
        )
        record = side_record(side, number, replayed, self._ideal, self._answers)
        return SideRun(self._folder.finish_unit(unit, record), replayed.served)

    def _unit(self, side: Side, number: int) -> str:
        return side if self._config.rounds == 1 else f"{side}, round {number + 1}"
