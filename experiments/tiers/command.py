"""`python -m experiments tiers`: what it takes to bring a prompt's beginning back into the pool.

Chunks that the pool gives up go to memory of the host, and to a disk, where another process finds
them (`CacheConfig.host_memory`, `disk`). The measure is the time to the first token of a prompt
whose beginning is in the pool, in memory, on the disk, or nowhere.

    python -m experiments tiers
    python -m experiments tiers --codec int4 --lengths 2048 8128
    python -m experiments tiers --trace mooncake_conversation_trace.jsonl
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.tiers.config import TiersConfig, check


def run(config: TiersConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    if config.trace is not None:
        with open_results("tiers", config) as folder:
            from experiments.tiers.replay import measure_trace

            return measure_trace(config, folder)
    source = parse_model(config.model)
    with open_results("tiers", config) as folder:
        from experiments.tiers.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    if "replays" in summary:
        *_, both = summary["replays"]
        return {"found": round(sum(both["found"].values()) / both["tokens"], 4)}
    longest = summary["lengths"][-1]
    return {
        "disk / computed": round(longest["seconds"]["disk"] / longest["seconds"]["computed"], 3)
    }


TIERS = Experiment("tiers", TiersConfig, run, check, headline)
