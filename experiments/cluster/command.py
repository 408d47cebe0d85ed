"""`python -m experiments cluster`: where a fleet of replicas finds what it has computed before.

Requests of a recorded service (`--trace`), or of conversations that are made up, are routed to 2 to
1,000 replicas. Each has a prefix tree, the engine's own, over a pool of its own, and tells the
router by KV events what it holds; router and policies are the library's. Only the devices are
simulated: how long prompts and steps take is a model of a few numbers, fitted to an engine that is
measured first, and checked against another run of it.

    python -m experiments cluster
    python -m experiments cluster --trace mooncake_conversation_trace.jsonl
    python -m experiments cluster --replicas 100 1000 --requests 20000 --chunk-size 256
    python -m experiments cluster --sweep load=0.3,0.6,0.9 --device runs/cluster-TIME/summary.json
"""

from __future__ import annotations

from typing import Any

from experiments.cluster.config import ClusterConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model


def run(config: ClusterConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use, or a file that cannot be read.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("cluster", config) as folder:
        from experiments.cluster.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: of the largest fleet."""
    most = max(one["replicas"] for one in summary["replays"])
    shown: dict[str, Any] = {}
    for one in summary["replays"]:
        if one["replicas"] == most:
            shown[f"hit rate, {one['policy']}"] = one["hit_rate"]
            shown[f"seconds to first token, {one['policy']}"] = one["first_token"]["p50"]
    return shown


CLUSTER = Experiment("cluster", ClusterConfig, run, check, headline)
