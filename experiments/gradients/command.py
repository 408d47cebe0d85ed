"""`python -m experiments gradients`: what training on answers that share their prompt costs.

Of every group there is one prompt and several answers, as when a policy is trained on its own
samples. `tree_log_probs` computes the prompt once, forward and backward; a padded batch computes it
in every sequence. Both compute layers again in the backward pass, and logits of the answers alone.

    python -m experiments gradients
    python -m experiments gradients --model smollm2 --prompts 1024 --groups 8
"""

from __future__ import annotations

from typing import Any

from experiments.gradients.config import GradientsConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model


def run(config: GradientsConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("gradients", config) as folder:
        from experiments.gradients.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: how much faster the tree was, at least and at most."""
    return {name: summary[name] for name in ("least_speedup", "most_speedup")}


GRADIENTS = Experiment("gradients", GradientsConfig, run, check, headline)
