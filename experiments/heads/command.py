"""`python -m experiments heads`: which KV heads must keep all tokens.

DuoAttention (arXiv 2410.10819): a few heads find what stood long ago, and the others do as well
with the first tokens and the last. A pattern says which. Here patterns are found by scores of one
forward pass over a text with random strings hidden in it, or by gates that are optimised as the
paper has it, and each is written into a folder that `--heads` takes. Then a table shows what the
model loses by each, beside patterns of chance: how much it still finds of strings that it read long
before, how far predictions of a text are off, and the bytes that heads would have to keep.

    python -m experiments heads
    python -m experiments heads --patterns learned --shares 0.5
    python -m experiments generate --heads runs/heads-TIME/scored --head-share 0.5

A run that was broken off goes on from the last thing that it measured, or the last gates saved.
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.heads.config import HeadsConfig, check
from experiments.loading import parse_model


def run(config: HeadsConfig) -> dict[str, Any]:
    """Find the patterns, print the table, and return the run's summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("heads", config) as folder:
        from experiments.heads.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: what the first pattern does at its first share."""
    if len(summary["measured"]) < 2:
        return {"patterns": " ".join(summary["patterns"])}
    first = summary["measured"][1]
    return {
        "pattern": first["pattern"],
        **{name: first[name] for name in ("share", "divergence", "perplexity_change")},
    }


HEADS = Experiment("heads", HeadsConfig, run, check, headline)
"""The options of `heads`."""
