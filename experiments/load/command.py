"""`python -m experiments load`: conversations by the hundred, with any endpoint.

As benchmarks of serving do it: conversations come at random, `--rate` a second (a Poisson
process), or so many are under way, `--at-once`. They stand behind shared system prompts, and each
of their `--turns` is behind all that was said before. Prompts are token ids, for `/v1/completions`,
so that they are exactly as long as is said whatever the tokenizer.

Reported are the time to the first token, the time for each token behind it, tokens a second, and
how many of the prompts' tokens the endpoint says were cached. Without `--url` the endpoint is one
of our own, in a process of its own; then the engine is also given the same conversations without
any, round by round in turns, and what the endpoint costs is the difference. Clients take their
share of the same cores.

    python -m experiments load
    python -m experiments load --url http://localhost:8000/v1 --rate 4 --turns 3
"""

from __future__ import annotations

from typing import Any

from experiments.endpoint.command import check_installed
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.load.config import LoadConfig, check


def run(config: LoadConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config`, or the endpoint, cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    if config.url is None:
        check_installed()
    with open_results("load", config) as folder:
        from experiments.load.run import measure

        return measure(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    sides = summary["sides"]
    speeds = {f"tokens/s, {name}": side["tokens_per_second"] for name, side in sides.items()}
    return speeds | {"overhead": summary["overhead"]}


LOAD = Experiment("load", LoadConfig, run, check, headline)
