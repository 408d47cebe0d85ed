"""Parse the command line, run the experiment, print its summary as the last line.

Nothing heavy is imported before the arguments are parsed: an experiment's module holds its config
and imports what it needs only when it runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import tyro

from experiments.compile_report import CompileReportConfig
from experiments.engine import EngineConfig
from experiments.generate import GenerateConfig
from experiments.gpu import GpuConfig
from experiments.harness.errors import user_errors
from experiments.kernel import KernelConfig
from experiments.models import ModelsConfig
from experiments.search import SearchConfig
from experiments.serve import ServeConfig
from experiments.soak import SoakConfig
from experiments.tree import TreeConfig

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "JAX_CHUNKATTN_DEBUG"

Config = (
    Annotated[CompileReportConfig, tyro.conf.subcommand("compile-report")]
    | Annotated[EngineConfig, tyro.conf.subcommand("engine")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
    | Annotated[GpuConfig, tyro.conf.subcommand("gpu")]
    | Annotated[KernelConfig, tyro.conf.subcommand("kernel")]
    | Annotated[ModelsConfig, tyro.conf.subcommand("models")]
    | Annotated[SearchConfig, tyro.conf.subcommand("search")]
    | Annotated[ServeConfig, tyro.conf.subcommand("serve")]
    | Annotated[SoakConfig, tyro.conf.subcommand("soak")]
    | Annotated[TreeConfig, tyro.conf.subcommand("tree")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    config: Any = tyro.cli(
        Config,  # pyright: ignore[reportArgumentType]
        prog="python -m experiments",
        description="Experiments with prefix-aware attention for LLM decoding in JAX.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return run_and_report(lambda: import_module(type(config).__module__).run(config))


def run_and_report(run: Callable[[], dict[str, Any]]) -> int:
    """Call `run`, print what it returns as one line of JSON, and turn errors into exit codes."""
    try:
        summary = run()
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
        return 1
    except user_errors() as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
