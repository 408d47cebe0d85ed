"""Running a state machine until chance has shown everything that it is to show."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

ROUNDS = 6  # at most: chance is against some event now and then


def run_until_seen(machine: Any, wanted: Collection[str], **options: Any) -> set[str]:
    """Runs `machine`, which counts events in its `seen`, once or more; gives those never seen.

    `options` are hypothesis' settings of a round.
    """
    machine.steps = 0
    machine.seen.clear()
    for number in range(ROUNDS):
        run_state_machine_as_test(
            _seeded(machine, number) if number else machine,
            settings=settings(
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
                **options,
            ),
        )
        if set(wanted) <= set(machine.seen):
            break
    return set(wanted) - set(machine.seen)


def _seeded(machine: Any, number: int) -> Any:
    """Where hypothesis is told to be deterministic, a second round would repeat the first."""

    @seed(number)
    def another() -> Any:
        return machine()

    return another
