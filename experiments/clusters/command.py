"""`python -m experiments clusters`: how many heads of each layer attend alike.

CHAI (arXiv 2403.08058): heads of a layer whose attention is alike form a cluster, one of them
attends for all, and keys are kept for that one alone. How many clusters each layer has is found
here, by the elbow of the error of k-means over a text, or for a share of the heads, and written
into files that `--clusters` takes. Then a table shows what the model loses by each, what is saved,
and whether it matters who is in a cluster and who attends for it.

    python -m experiments clusters --model ./opt-1.3b
    python -m experiments clusters --model ./opt-1.3b --shares 0.5 --memberships medoid random
    python -m experiments generate --model ./opt-1.3b --clusters runs/clusters-TIME/elbow.json

Models with many KV heads gain: GPT-2, OPT, Llama 2. Heads of one group in grouped-query attention
have their keys in common anyway. A run that was broken off goes on from the last thing measured.
"""

from __future__ import annotations

from typing import Any

from experiments.clusters.config import ClustersConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model


def run(config: ClustersConfig) -> dict[str, Any]:
    """Find the clusters, write the files, print the table, and return the run's summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("clusters", config) as folder:
        from experiments.clusters.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: what the elbow's clusters do."""
    first = summary["measured"][1]
    names = "clusters", "divergence", "perplexity_change"
    return {name: first[name] for name in names}


CLUSTERS = Experiment("clusters", ClustersConfig, run, check, headline)
"""The options of `clusters`."""
