"""`python -m experiments grpo`: reinforcement learning with rollouts by the engine.

Group relative policy optimisation (Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1): of
each question there are several answers, and how much better one is than the others of its group is
the advantage of its tokens. The engine samples the groups and tells their log-probabilities,
`tree_log_probs` differentiates through the tree of all samples, and `Engine.update_weights` puts
the new weights into the engine, in each step. Beside it the same training without sharing: every
sample computes its own prompt, when it is sampled and when it is trained on.

The task is learnt from random weights, by nothing but a reward: the share of an answer's digits
that are right.

    python -m experiments grpo
    python -m experiments grpo --task reverse --digits 4 --steps 600
"""

from __future__ import annotations

from typing import Any

from experiments.grpo.config import GrpoConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results


def run(config: GrpoConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("grpo", config) as folder:
        from experiments.grpo.run import train

        return train(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: the reward at the end, and what a step takes."""
    ways = summary["ways"].items()
    return {"reward": summary["reward"]} | {f"{name}, s a step": way["step"] for name, way in ways}


GRPO = Experiment("grpo", GrpoConfig, run, check, headline)
