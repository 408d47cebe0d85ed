"""`python -m experiments tree`: what the prefix tree costs on the host.

Two questions. Does a lookup cost the same whatever the size of the tree and the number of children
of a node? How long does planning a large batch take? No model runs and no device is used. What a
cache finds is told by `python -m experiments cache`.

    python -m experiments tree
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from experiments.harness.environment import describe_host
from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_at_least_one
from experiments.harness.results import open_results


@dataclass(frozen=True)
class TreeConfig:
    """Measure the prefix tree: time and memory as it grows, and the time to plan a batch."""

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

    seed: int = 0
    """Seed of the prompts."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/tree-TIME")] = None
    """Folder for the results."""


def run(config: TreeConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    from experiments.tree_planning import measure_planning
    from experiments.tree_report import TreeReport
    from experiments.tree_synthetic import measure_children, measure_growth

    report = TreeReport()
    summary: dict[str, Any] = {"experiment": "tree", **_setting(config)}
    with open_results("tree", config) as folder:
        growth, summary["bytes_per_node"], summary["evict_microseconds"] = measure_growth(config)
        summary["growth"] = growth
        summary["children"] = [measure_children(config, count) for count in config.children]
        report.print_costs(config, summary)
        summary["planning"] = measure_planning(config)
        report.print_planning(summary["planning"])
        folder.begin({**describe_host(), "device": None, "device_count": 0})
        for kind in ("growth", "children", "planning"):
            for record in summary[kind]:
                folder.write_record({"kind": kind, **record})
        folder.write_summary(summary)
    return summary


def check(config: TreeConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "chunks", "prompt_tokens", "chunk_size", "samples", "children")
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
