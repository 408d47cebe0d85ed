"""Parse the command line, run the experiment, and tell how it went.

Nothing heavy is imported before the arguments are parsed: an experiment's module holds its config
and imports what it needs only when it runs.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from experiments.harness.interrupts import no_interrupt_lost
from experiments.harness.invocation import (
    Running,
    Showing,
    check_texts,
    expand,
    tell_changes,
    without_option,
)
from experiments.harness.json_text import to_json
from experiments.harness.results import begin_anew, new_run_path
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
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack an answer's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet_consoles(as_json), no_interrupt_lost():
            summary = run()
        if as_json:
            print(to_json(summary, ascii_only=True))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(": ".join(("interrupted", *map(str, interrupt.args))), file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _give_up_standard_output()  # whoever read it is gone
        return EXIT_FAILED
    except CheckFailed as failed:
        if as_json:
            print(to_json(failed.summary, ascii_only=True), flush=True)
        print(f"failed: {failed}", file=sys.stderr)
        return EXIT_FAILED
    except user_errors() as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        if os.environ.get(DEBUG_VARIABLE) or error.errno not in _NO_ROOM:
            raise
        where = error.filename or "standard output or a file"
        print(f"error: {where} cannot be written ({error.strerror})", file=sys.stderr)
        _give_up_standard_output()
        return EXIT_BAD_INPUT


def _give_up_standard_output() -> None:
    """What it still holds would fail once more when the process ends."""
    with suppress(OSError, ValueError):  # not a real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> dict[str, Any]:
    check_texts(arguments)
    name = next((one for one in arguments if not one.startswith("-")), None)
    if name in EXPERIMENTS:
        return _run_experiment(name, arguments)
    given = _parse(arguments)
    return _module(given).run(given.experiment)


def _run_experiment(name: str, arguments: list[str]) -> dict[str, Any]:
    config_class = EXPERIMENTS[name]
    at = arguments.index(name) + 1
    arguments = [*arguments[:at], *expand(config_class, name, arguments[at:])]
    check_texts(arguments)
    given = _parse(arguments)
    config, options = given.experiment, given.run
    tell_changes(config, arguments)
    if options.fresh:
        folder = config.output or new_run_path("sweep" if options.sweep else name)
        begin_anew(folder)
        config = dataclasses.replace(config, output=folder)
    module = _module(given)
    if not options.sweep:
        return module.run(config)
    from experiments.harness.sweep import make_points, parse_sweep, run_sweep

    fields = parse_sweep(options.sweep, config_class)
    plain = without_option("--sweep", arguments)
    points = make_points(fields, config_class, lambda more: _parse([*plain, *more]).experiment)
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
