"""`python -m experiments engine`: what the engine costs on top of the bare decode loop.

The bare loop is the compiled decode program called again and again, with plans made beforehand
and nothing read back: the most that an engine can reach at these shapes. The engine does all it
does for its users meanwhile: it keeps the tree, plans, takes over tokens, tells its requests. Both
decode the same rows of the same lengths, in turns.

    python -m experiments engine
    python -m experiments engine --rows 1 --tokens 256
    python -m experiments engine --mesh-of-one
"""

from __future__ import annotations

from typing import Any

from experiments.engine.config import EngineConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model


def run(config: EngineConfig) -> dict[str, Any]:
    """Run the comparison, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("engine", config) as folder:
        from experiments.engine.run import compare

        return compare(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    return {
        "tokens/s, engine": summary["engine_tokens_per_second"],
        "tokens/s, bare loop": summary["bare_tokens_per_second"],
        "engine / bare loop": summary["ratio"],
    }


ENGINE = Experiment("engine", EngineConfig, run, check, headline)
