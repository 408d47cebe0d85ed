"""`python -m experiments tree`: what the prefix tree costs on the host.

Two questions. Does a lookup cost the same whatever the size of the tree and the number of children
of a node? How long does planning a large batch take? No model runs and no device is used. What a
cache finds is told by `python -m experiments cache`.

    python -m experiments tree
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.tree.config import TreeConfig, check


def run(config: TreeConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("tree", config) as folder:
        from experiments.tree.run import measure

        return measure(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    largest = summary["sizes"][-1]
    return {
        "match, us": largest["match"]["median"],
        "insert, us": largest["insert_known"]["median"],
        "bytes per node": summary["bytes_per_node"],
    }


TREE = Experiment("tree", TreeConfig, run, check, headline)
