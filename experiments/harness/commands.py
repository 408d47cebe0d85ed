"""What the command line calls: a command that only tells something, or an experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from experiments.harness.reading import Record

C = TypeVar("C")


@dataclass(frozen=True)
class Command(Generic[C]):
    """A command that leaves no results.

    Attributes:
      name: what is typed.
      config: the class of its options, whose docstring describes the command in `--help`.
      run: prints what it finds, and returns it as JSON values.
    """

    name: str
    config: type[C]
    run: Callable[[C], Record]


@dataclass(frozen=True)
class Experiment(Command[C]):
    """A command that leaves a folder of results; `run` returns its summary.

    Attributes:
      check: raises `UserError` for options that no run could use.
      headline: the numbers of a summary that a sweep shows.
    """

    check: Callable[[C], None]
    headline: Callable[[Record], Record]
