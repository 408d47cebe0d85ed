"""`python -m experiments serve`: an engine under a service's load, with and without sharing.

Requests come one after another and are served together, as in a server: `--trace` replays those of
a recorded service, and without one every request stands behind a made-up system prompt, as in
ChunkAttention's Table 4 (Ye et al., ACL 2024, arXiv 2402.15220). The same requests are served by
each `--sides`:

- `shared`: prefixes are stored and computed once, and stay cached when their requests have left;
- `free-at-once`: the same, but freed when their last request leaves, as in the paper;
- `unshared`: every request has its own, as in a server without a prefix cache.

They come as fast as they are served, `--closed` at once; or in time, a trace's `--speed` times as
fast as they came then, or at `--rate` a second with exponential gaps (a Poisson process).

Reported are the time to first token (from arrival to the first token), the time per output token
after it, and the normalised latency (from arrival to end, per output token: the paper's measure);
what was found in the cache, against what a cache without bound would have found; memory, evictions
and preemptions. Compiling is in no time: while the engine compiles, the clock stands still, for
arrivals too.

Lengths are scaled, so that what a large model served can be served by a small one: `--scale 16`
makes 1 token of 16, so a trace's block of 512 tokens becomes 32. What a block's tokens are is made
up, always the same for one id; so the answers mean nothing, and never stand in a later prompt.

    python -m experiments serve
    python -m experiments serve --trace mooncake_conversation_trace.jsonl
    python -m experiments serve --trace mooncake_conversation_trace.jsonl --speed 60
    python -m experiments serve --model smollm2 --requests 32 --rate 0.5
"""

from __future__ import annotations

import time
from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.serve.config import ServeConfig, check
from experiments.serve.inputs import read_inputs


def run(config: ServeConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: something in `config`, or a file it names, cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    started = time.perf_counter()
    check(config)
    inputs = read_inputs(config)
    with open_results("serve", config) as folder:
        from experiments.serve.run import serve

        return serve(config, inputs, folder, started)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    sides = {record["side"]: record for record in summary["sides"]}
    latency = {
        f"ms/token, {side}": 1e3 * record["normalised_latency"]["mean"]
        for side, record in sides.items()
    }
    held = {f"peak KV MiB, {side}": one["peak_kv_bytes"] / 2**20 for side, one in sides.items()}
    return latency | held


SERVE = Experiment("serve", ServeConfig, run, check, headline)
