"""`python -m experiments minor`: what a long generation could drop beside a shared prefix.

CORM (arXiv 2404.15949): a key is important to a query if its weight is at least one divided by the
number of tokens, and what was important to none of the last queries, and is not recent, is dropped
for good, head by head and token by token. Here a chunk of all its tokens is stored and read as one,
and what others share cannot be dropped for one of them. So this measures, on answers that a model
gives behind one prompt, what is left: of the tokens in each head, as in the paper; of the chunks of
an answer of which a KV head, a layer, or the whole model needs no token any more.

Nothing is dropped while it is measured. Where it is, the weights of what stays grow, and more of it
is important: these are upper bounds.

    python -m experiments minor
    python -m experiments minor --temperature 0 --recent 256
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.minor.config import MinorConfig, check


def run(config: MinorConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("minor", config) as folder:
        from experiments.minor.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: by the first `--recent`, in the smallest chunks."""
    first = summary["measured"][0]
    return {
        "tokens of heads": round(first["head_tokens"]["reads"], 3),
        "chunks of layers": round(first["layer_chunks"]["reads"], 3),
    }


MINOR = Experiment("minor", MinorConfig, run, check, headline)
"""The options of `minor`."""
