"""`python -m experiments soak`: random work for a long time, and proof that nothing leaks.

Requests of every kind come at random, in waves that overload the engine, bursts, and lulls that
leave it idle, over a pool that is too small for them: long and short prompts behind shared prefixes
or behind none, samples, forks, conversations, penalties, stop tokens, held requests, pins, salts,
and aborts at any moment. At the end these must hold, or the exit code is 1:

* resident memory is flat: its median over the run's last quarter is within 2% of the first's;
* nothing was compiled once the engine was warm;
* every request ended, for a reason that fits what it asked for, and streamed each token once;
* greedy answers are those that a fresh engine gives to each request alone;
* the engine's own invariants held whenever they were checked, no chunk was lost, and after a reset
  all chunks are free.

    python -m experiments soak --minutes 5
    python -m experiments soak --model smollm2 --rows 8 --minutes 30
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.errors import CheckFailed
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.soak.config import SoakConfig, check


def run(config: SoakConfig) -> dict[str, Any]:
    """Run the soak, print and write what it found, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        CheckFailed: with what did not hold, once the results are written and printed.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("soak", config) as folder:
        from experiments.soak.run import soak

        summary = soak(config, source, folder)
    if summary["failures"]:
        raise CheckFailed("; ".join(summary["failures"]), summary)
    return summary


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    names = ("requests", "decode_tokens_per_second", "preemptions", "memory_growth")
    return {name: summary[name] for name in names}


SOAK = Experiment("soak", SoakConfig, run, check, headline)
