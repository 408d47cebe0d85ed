"""`python -m experiments tree`: what the prefix tree costs on the host, and what it would hit.

Three questions. Does a lookup cost the same whatever the size of the tree and the number of
children of a node? How long does planning a large batch take? And how many blocks of a recorded
service's requests (`--trace`) would a cache of a given size have held? No model runs and no device
is used.

    python -m experiments tree
    python -m experiments tree --trace mooncake_conversation_trace.jsonl --pool-chunks 10000 50000
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from experiments.harness.environment import describe_host
from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_at_least_one
from experiments.harness.results import open_results


@dataclass(frozen=True)
class TreeConfig:
    """Measure the prefix tree: time and memory as it grows, the time to plan a batch, and the hit
    rate of a real trace."""

    chunks: int = 1_000_000
    """Nodes of the largest tree; powers of ten from 1,000 up are measured on the way."""

    prompt_tokens: int = 4096
    """Tokens of the prompts that are matched and inserted."""

    chunk_size: int = 64
    """Tokens in a chunk."""

    children: tuple[int, ...] = (1, 1_000, 100_000)
    """Numbers of children of the root to measure at."""

    samples: int = 200
    """Prompts timed for each number that is reported, as their median and 95th percentile."""

    trace: Annotated[Path | None, by_default("FILE", "no trace")] = None
    """A request trace in the format of Mooncake's releases: JSON lines with `input_length` and
    `hash_ids`, which name the prompt's blocks of 512 tokens; equal ids are equal prefixes."""

    pool_chunks: tuple[int, ...] = (1_000, 10_000, 50_000)
    """Pool sizes to replay the trace with, in blocks, besides one without bound."""

    seed: int = 0
    """Seed of the prompts."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/tree-TIME")] = None
    """Folder for the results."""


def run(config: TreeConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use, or a trace that cannot be read.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    from experiments.tree_planning import measure_planning
    from experiments.tree_report import TreeReport
    from experiments.tree_synthetic import measure_children, measure_growth
    from experiments.tree_trace import read_trace, replay

    requests = read_trace(config.trace) if config.trace else []
    report = TreeReport()
    summary: dict[str, Any] = {"experiment": "tree", **_setting(config)}
    with open_results("tree", config) as folder:
        growth, summary["bytes_per_node"], summary["evict_microseconds"] = measure_growth(config)
        summary["growth"] = growth
        summary["children"] = [measure_children(config, count) for count in config.children]
        report.print_costs(config, summary)
        summary["planning"] = measure_planning(config)
        report.print_planning(summary["planning"])
        if config.trace:
            unbounded = in_fresh_process(replay, requests, None)
            bounded = [replay(requests, num_chunks) for num_chunks in config.pool_chunks]
            summary["trace"] = [unbounded, *bounded]
            report.print_trace(summary["trace"])
        folder.begin({**describe_host(), "device": None, "device_count": 0})
        for kind in ("growth", "children", "planning", "trace"):
            for record in summary.get(kind, ()):
                folder.write_record({"kind": kind, **record})
        folder.write_summary(summary)
    return summary


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, where no memory freed by an earlier
    measurement is there to be used again."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(
        1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        return pool.submit(function, *arguments).result()


def check(config: TreeConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(
        config, "chunks", "prompt_tokens", "chunk_size", "samples", "children", "pool_chunks"
    )
    if config.prompt_tokens < 2 * config.chunk_size:
        raise UserError(
            f"--prompt-tokens {config.prompt_tokens} must fill at least two chunks of "
            f"--chunk-size {config.chunk_size}"
        )
    if config.seed < 0:
        raise UserError(f"--seed must be at least 0, got {config.seed}")


def _setting(config: TreeConfig) -> dict[str, Any]:
    return {
        "chunk_size": config.chunk_size,
        "prompt_tokens": config.prompt_tokens,
        "samples": config.samples,
        "seed": config.seed,
        **describe_host(),
    }
