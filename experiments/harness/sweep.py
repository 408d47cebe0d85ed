"""`--sweep OPTION=A,B,C`: one experiment for every value, or every combination of values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.console import quiet_consoles
from experiments.harness.environment import describe_environment
from experiments.harness.errors import CheckFailed, UserError
from experiments.harness.inputs import check_unchanged, inputs_of
from experiments.harness.options import boolean_option, option
from experiments.harness.reading import RESULTS, SWEEP, Record, read_result
from experiments.harness.results import ResultFolder, config_record
from experiments.harness.runs import open_results
from experiments.harness.units import measure_units
from experiments.harness.views import finish

_LONGEST_NAME = 255

Values = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What makes two sweeps the same.

    Attributes:
      of: the experiment.
      fields: the values of each option that is swept, as typed.
      base: the config of the experiment otherwise.
    """

    of: str
    fields: dict[str, list[str]]
    base: dict[str, Any]
    output: Path | None


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: the values that it has of what is swept, and its config."""

    fields: dict[str, str]
    config: Any

    @property
    def name(self) -> str:
        """Also that of its folder."""
        values = ",".join(f"{name}={value}" for name, value in self.fields.items())
        return values.replace("%", "%25").replace("/", "%2F")


def parse_sweep(given: Sequence[str], config_class: Any) -> Values:
    """The values of each field.

    Raises:
      UserError: it is not `OPTION=A,B,C`, or names no option of the experiment.
    """
    known = sorted({field.name for field in dataclasses.fields(config_class)} - {"output"})
    fields: Values = {}
    for text in given:
        name, _, listed = text.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        values = tuple(value for value in listed.split(",") if value)
        if name not in known:
            raise UserError(f"--sweep {text}: unknown option {name!r}; known: {', '.join(known)}")
        if not values or len(set(values)) < len(values):
            raise UserError(f"--sweep {text}: expected OPTION=A,B,C with values that differ")
        if name in fields:
            raise UserError(f"--sweep names {option(name)} twice: list its values in one")
        fields[name] = values
    return fields


def make_points(
    fields: Values, config_class: Any, parse: Callable[[list[str]], Any]
) -> list[Point]:
    """Every combination; `parse` gives the config for some more arguments."""
    switches = {f.name for f in dataclasses.fields(config_class) if isinstance(f.default, bool)}
    points = []
    for values in itertools.product(*fields.values()):
        chosen = dict(zip(fields, values, strict=True))
        points.append(Point(chosen, parse([_argument(n, v, switches) for n, v in chosen.items()])))
        if len(points[-1].name.encode()) > _LONGEST_NAME:
            raise UserError(
                f"--sweep: a folder cannot be named {points[-1].name:.60}... after its point, in "
                f"more than {_LONGEST_NAME} bytes; give files shorter names"
            )
    return points


def _argument(name: str, value: str, switches: Collection[str]) -> str:
    if name not in switches:
        return f"{option(name)}={value}"
    if value.lower() not in ("true", "false"):
        raise UserError(f"--sweep {name.replace('_', '-')}={value}: expected true or false")
    return boolean_option(name, value.lower() == "true")


def run_sweep(
    experiment: Experiment[Any], base: Any, fields: Values, points: Sequence[Point]
) -> Record:
    """Run every point into a folder of its own; one that a broken sweep has finished is kept.

    Prints a table of the headlines and draws them over what is swept; returns the summary.

    Raises:
        CheckFailed: at the end, when a point's check failed.
    """
    shown = config_record(base)
    for field in (*fields, "output"):
        del shown[field]
    listed = {field: list(values) for field, values in fields.items()}
    config = SweepConfig(experiment.name, listed, shown, base.output)
    inputs = {name: one for point in points for name, one in inputs_of(point.config).items()}
    with open_results(SWEEP, config, inputs=inputs) as folder:
        environment = describe_environment()
        folder.begin(environment)

        def measure(point: Point) -> Record:
            summary, failure = _run_point(point, folder, experiment.run)
            return {
                "kind": "point",
                "fields": point.fields,
                "folder": point.name,
                "headline": experiment.headline(summary),
                "failure": failure,
            }

        units = {point.name: lambda point=point: measure(point) for point in points}
        records = measure_units(folder, units, f"{experiment.name} sweep")
        summary = {
            "experiment": SWEEP,
            "of": experiment.name,
            "fields": listed,
            "points": [
                {"fields": record["fields"], "headline": record["headline"]} for record in records
            ],
            "failures": [
                f"{record['unit']}: {record['failure']}" for record in records if record["failure"]
            ],
            "environment": environment,
        }
        finish(folder, summary)
    if summary["failures"]:
        raise CheckFailed("; ".join(summary["failures"]), summary)
    return summary


def _run_point(
    point: Point, folder: ResultFolder, run: Callable[[Any], Record]
) -> tuple[Record, str | None]:
    """The summary of a run, and what it was to prove and did not."""
    path = folder.path / point.name
    check_unchanged(folder.inputs, point.config)
    if (path / RESULTS).exists() and (summary := read_result(path).summary) is not None:
        return summary, "; ".join(summary.get("failures", ())) or None
    try:
        with quiet_consoles():
            return run(dataclasses.replace(point.config, output=path)), None
    except CheckFailed as failed:
        return failed.summary, str(failed)
