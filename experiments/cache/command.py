"""`python -m experiments cache`: how much a prefix cache finds, by its size and what it evicts.

Requests are replayed into a cache of keys and values, with no model: a trace of a recorded service
(`--trace`), or conversations that are made up. For each size of the pool, eviction policy and chunk
size it tells how many of all prompt tokens were found. `lru` and `free-at-once` are the engine's
policies, and their numbers are exactly what its prefix tree would do; all others are simulated, to
show what another policy could gain. No policy can find more than `optimal`, which knows the future.

Requests are served one after another, and only prompts are cached: a trace does not tell what the
answers are, nor what two blocks of different ids have in common. `free-at-once` keeps nothing that
no request holds, so for it alone requests overlap.

    python -m experiments cache
    python -m experiments cache --trace mooncake_conversation_trace.jsonl
    python -m experiments cache --pool-tokens 500000 1000000 --bytes-per-token 131072
    python -m experiments cache --codec identity int8 int4 --trace mooncake_conversation_trace.jsonl
"""

from __future__ import annotations

from typing import Any

from experiments.cache.config import CacheConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results


def run(config: CacheConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use, or a trace that cannot be read.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("cache", config) as folder:
        from experiments.cache.run import measure

        return measure(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, float | str | None]:
    """What a comparison of runs shows: of the first chunk size."""
    rates = summary["hit_rates"][0]
    sizes = summary["pool_tokens"]
    least, most = sizes.index(min(sizes)), sizes.index(max(sizes))

    def rate(policy: str, pool: int) -> float | None:
        return rates[policy][pool] if policy in rates else None

    return {
        "hit rate, LRU, smallest pool": rate("lru", least),
        "hit rate, LRU, largest pool": rate("lru", most),
        "hit rate, optimal, smallest pool": rate("optimal", least),
        "hit rate, no bound": rates["no bound"],
    }


CACHE = Experiment("cache", CacheConfig, run, check, headline)
