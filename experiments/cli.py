"""Parse the command line, run the experiment, and tell how it went.

Nothing heavy is imported before the arguments are parsed: an experiment's module holds its config
and imports what it needs only when it runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, Union

import tyro

from experiments.cache.command import CacheConfig
from experiments.compile_report.command import CompileReportConfig
from experiments.decode.command import DecodeConfig
from experiments.doctor.command import DoctorConfig
from experiments.engine.command import EngineConfig
from experiments.generate.command import GenerateConfig
from experiments.gpu.command import GpuConfig
from experiments.harness.console import quiet_consoles
from experiments.harness.errors import CheckFailed, user_errors
from experiments.harness.invocation import (
    Running,
    Showing,
    expand,
    without_option,
)
from experiments.harness.results import new_run_path
from experiments.kernel.command import KernelConfig
from experiments.models.command import ModelsConfig
from experiments.quality.command import QualityConfig
from experiments.report.command import ReportConfig
from experiments.search.command import SearchConfig
from experiments.serve.command import ServeConfig
from experiments.soak.command import SoakConfig
from experiments.tree.command import TreeConfig

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "JAX_CHUNKATTN_DEBUG"

EXPERIMENTS: dict[str, Any] = {
    "generate": GenerateConfig,
    "kernel": KernelConfig,
    "decode": DecodeConfig,
    "serve": ServeConfig,
    "quality": QualityConfig,
    "cache": CacheConfig,
    "search": SearchConfig,
    "engine": EngineConfig,
    "soak": SoakConfig,
    "tree": TreeConfig,
    "compile-report": CompileReportConfig,
    "gpu": GpuConfig,
}
"""Those that leave a folder of results."""

COMMANDS: dict[str, Any] = {
    "doctor": DoctorConfig,
    "models": ModelsConfig,
    "report": ReportConfig,
}
"""Those that only tell something."""

_DESCRIPTION = (
    "Experiments with prefix-aware attention for LLM decoding in JAX. Exit codes: 0 done, 1 what a "
    "run was to prove does not hold, 2 something given cannot be used, 130 interrupted."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (a check failed), 2 or 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return run_and_report(lambda: _run(arguments), "--json" in arguments)


def run_and_report(run: Callable[[], dict[str, Any]], as_json: bool = False) -> int:
    """Call `run` and turn errors into exit codes; what it returns is printed only as JSON."""
    try:
        with quiet_consoles(as_json):
            summary = run()
        if as_json:
            print(json.dumps(summary), flush=True)
        return 0
    except KeyboardInterrupt as interrupt:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(": ".join(("interrupted", *map(str, interrupt.args))), file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read standard output is gone; closing it at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except CheckFailed as failed:
        if as_json:
            print(json.dumps(failed.summary), flush=True)
        print(f"failed: {failed}", file=sys.stderr)
        return EXIT_FAILED
    except user_errors() as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(arguments: list[str]) -> dict[str, Any]:
    name = next((one for one in arguments if not one.startswith("-")), None)
    if name in EXPERIMENTS:
        return _run_experiment(name, arguments)
    given = _parse(arguments)
    return _module(given).run(given.experiment)


def _run_experiment(name: str, arguments: list[str]) -> dict[str, Any]:
    config_class = EXPERIMENTS[name]
    at = arguments.index(name) + 1
    arguments = [*arguments[:at], *expand(config_class, name, arguments[at:])]
    given = _parse(arguments)
    config, options = given.experiment, given.run
    if options.fresh and config.output is None:
        folder = new_run_path("sweep" if options.sweep else name)
        config = dataclasses.replace(config, output=folder)
    module = _module(given)
    if not options.sweep:
        return module.run(config)
    from experiments.harness.sweep import make_points, parse_sweep, run_sweep

    fields = parse_sweep(options.sweep, config_class)
    plain = without_option("--sweep", arguments)
    points = make_points(fields, lambda more: _parse([*plain, *more]).experiment)
    for point in points:
        module.check(point.config)
    return run_sweep(name, config, fields, points, module.run, module.headline)


def _module(given: Any) -> Any:
    return import_module(type(given.experiment).__module__)


def _parse(arguments: Sequence[str]) -> Any:
    return tyro.cli(
        _every_command(),
        prog="python -m experiments",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )


def _every_command() -> Any:
    """The union that tyro takes for subcommands."""
    named: list[tuple[str, Any, Any]] = [
        (name, Running, config) for name, config in EXPERIMENTS.items()
    ]
    named += [(name, Showing, config) for name, config in COMMANDS.items()]
    commands = [
        Annotated[how[config], tyro.conf.subcommand(name, description=config.__doc__)]
        for name, how, config in named
    ]
    return Union[tuple(commands)]  # noqa: UP007 -- of a list
