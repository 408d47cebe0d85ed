"""`python -m experiments distill-prefix`: a learned prefix that stands for a system prompt.

The model answers questions behind the prompt; then keys and values of a few virtual tokens are
trained until it says behind them what it says behind the prompt. What is left apart is measured on
questions that nothing was learned from. The same command goes on with a run that was broken off,
from the state that was saved last.

    python -m experiments distill-prefix
    python -m experiments distill-prefix --system-prompt prompt.txt --tokens 128
    python -m experiments generate --prefix runs/distill-prefix-TIME/prefix
"""

from __future__ import annotations

from typing import Any

from experiments.distill_prefix.config import DistillPrefixConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.errors import UserError
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.prompts import read_prompts, read_system_prompt


def run(config: DistillPrefixConfig) -> dict[str, Any]:
    """Train, write the prefix, print the table, and return the run's summary.

    Raises:
        UserError: something in `config`, or a file it names, cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    lines = read_prompts(config.prompts)
    if config.held_out >= len(lines):
        raise UserError(
            f"--held-out {config.held_out} of {len(lines)} questions leaves none to learn from"
        )
    whole = next((line for line in lines if line.text is None), None)
    if whole is not None:
        raise UserError(f"prompts file {whole.where}: a question must be text, to follow a prompt")
    given = parse_model(config.model), read_system_prompt(config.system_prompt), lines
    with open_results("distill-prefix", config) as folder:
        from experiments.distill_prefix.run import distill

        return distill(config, *given, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: how far it is from the prompt."""
    return {
        "divergence": summary["divergence"],
        "perplexity": summary["perplexity"]["prefix"],
        "behind the prompt": summary["perplexity"]["prompt"],
    }


DISTILL_PREFIX = Experiment("distill-prefix", DistillPrefixConfig, run, check, headline)
