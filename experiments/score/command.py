"""`python -m experiments score`: what it takes to say how likely continuations of a prefix are.

Multiple-choice tasks, rewards and perplexities behind a long prompt all ask for the
log-probabilities of a few given tokens. `Engine.score` computes the prefix once, or finds it in the
cache, and of each continuation its own tokens, with the prefix's last one. The measure is what the
same tokens take behind a prefix of a single token.

    python -m experiments score
    python -m experiments score --continuations 100 --tokens 8
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.score.config import ScoreConfig, check


def run(config: ScoreConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("score", config) as folder:
        from experiments.score.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    return {"cached / alone": summary["cached_over_alone"]}


SCORE = Experiment("score", ScoreConfig, run, check, headline)
