"""Parse the command line, run the experiment, and tell how it went.

Nothing heavy is imported before the arguments are parsed: what a command needs to run is imported
when it runs.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Union

import tyro

from experiments.cache.command import CACHE
from experiments.calibrate.command import CALIBRATE
from experiments.cluster.command import CLUSTER
from experiments.clusters.command import CLUSTERS
from experiments.compile_report.command import COMPILE_REPORT
from experiments.decode.command import DECODE
from experiments.distill_prefix.command import DISTILL_PREFIX
from experiments.doctor.command import DOCTOR
from experiments.endpoint.command import ENDPOINT
from experiments.engine.command import ENGINE
from experiments.generate.command import GENERATE
from experiments.gpu.command import GPU
from experiments.gradients.command import GRADIENTS
from experiments.grpo.command import GRPO
from experiments.harness.commands import Command, Experiment
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
from experiments.harness.runs import begin_anew, new_run_path
from experiments.heads.command import HEADS
from experiments.kernel.command import KERNEL
from experiments.layers.command import LAYERS
from experiments.load.command import LOAD
from experiments.minor.command import MINOR
from experiments.models.command import MODELS
from experiments.quality.command import QUALITY
from experiments.report.command import REPORT
from experiments.scale.command import SCALE
from experiments.score.command import SCORE
from experiments.search.command import SEARCH
from experiments.serve.command import SERVE
from experiments.soak.command import SOAK
from experiments.sparse.command import SPARSE
from experiments.tiers.command import TIERS
from experiments.train_tiny.command import TRAIN_TINY
from experiments.tree.command import TREE

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "JAX_CHUNKATTN_DEBUG"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

EXPERIMENTS: dict[str, Experiment[Any]] = {
    one.name: one
    for one in (
        GENERATE,
        KERNEL,
        DECODE,
        SERVE,
        LOAD,
        QUALITY,
        CALIBRATE,
        HEADS,
        LAYERS,
        CLUSTERS,
        TRAIN_TINY,
        DISTILL_PREFIX,
        CACHE,
        CLUSTER,
        SCALE,
        SEARCH,
        SCORE,
        GRADIENTS,
        GRPO,
        SPARSE,
        TIERS,
        MINOR,
        ENGINE,
        SOAK,
        TREE,
        COMPILE_REPORT,
        GPU,
    )
}
"""Those that leave a folder of results."""

COMMANDS: dict[str, Command[Any]] = {one.name: one for one in (ENDPOINT, DOCTOR, MODELS, REPORT)}
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
        return _run_experiment(EXPERIMENTS[name], arguments)
    given = _parse(arguments)
    [command] = [one for one in COMMANDS.values() if isinstance(given.experiment, one.config)]
    return command.run(given.experiment)


def _run_experiment(experiment: Experiment[Any], arguments: list[str]) -> dict[str, Any]:
    name = experiment.name
    at = arguments.index(name) + 1
    arguments = [*arguments[:at], *expand(experiment.config, name, arguments[at:])]
    check_texts(arguments)
    given = _parse(arguments)
    config, options = given.experiment, given.run
    tell_changes(config, arguments)
    if options.fresh:
        folder = config.output or new_run_path("sweep" if options.sweep else name)
        begin_anew(folder)
        config = dataclasses.replace(config, output=folder)
    if not options.sweep:
        return experiment.run(config)
    from experiments.harness.sweep import make_points, parse_sweep, run_sweep

    fields = parse_sweep(options.sweep, experiment.config)
    plain = without_option("--sweep", arguments)
    points = make_points(fields, experiment.config, lambda more: _parse([*plain, *more]).experiment)
    for point in points:
        experiment.check(point.config)
    return run_sweep(experiment, config, fields, points)


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
    commands = [
        Annotated[
            (Running if one.name in EXPERIMENTS else Showing)[one.config],
            tyro.conf.subcommand(one.name, description=one.config.__doc__),
        ]
        for one in (*EXPERIMENTS.values(), *COMMANDS.values())
    ]
    return Union[tuple(commands)]  # noqa: UP007 -- of a list
