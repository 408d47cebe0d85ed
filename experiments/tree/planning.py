"""Time of planning a batch, as an engine does when its tree has changed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from experiments.tree.config import TreeConfig
from experiments.tree.synthetic import quantiles
from jax_chunkattn.planning.options import PACKINGS
from jax_chunkattn.planning.planner import GpuWork, PlannerOptions, plan_decode
from jax_chunkattn.tree.nodes import SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree

ROWS = 256
GROUPS = 16
ROOT_CHUNKS, GROUP_CHUNKS = 64, 16
PRIVATE_CHUNKS = (16, 19)  # from, to
NUM_HEADS, NUM_KV_HEADS = 32, 8


def measure_planning(config: TreeConfig) -> list[dict[str, Any]]:
    """Microseconds of `plan_decode` with the options for a CPU and each packing for a GPU.

    256 rows in 16 groups: 64 chunks in common to all, 16 to each group, 16 to 18 of each row's own,
    about 5,000 in all.
    """
    rows, num_chunks = _rows(config)
    options = {"CPU": PlannerOptions()}
    for packing in PACKINGS:
        gpu = GpuWork(
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            chunk_size=config.chunk_size,
            packing=packing,
        )
        options[f"GPU, {packing}"] = PlannerOptions(gpu=gpu)
    records = []
    for name, each in options.items():
        seconds = [_plan_seconds(rows, config.chunk_size, each) for _ in range(config.samples + 1)]
        plan = quantiles(seconds[1:])  # the first one warms up
        records.append({"options": name, "rows": ROWS, "chunks": num_chunks, "plan": plan})
    return records


def _rows(config: TreeConfig) -> tuple[list[SequenceHandle], int]:
    """The rows of such a tree, and how many chunks they hold."""
    random = np.random.default_rng(config.seed)

    def tokens(chunks: int) -> np.ndarray:
        return random.integers(0, 50_000, chunks * config.chunk_size, np.int32)

    most = ROOT_CHUNKS + GROUPS * GROUP_CHUNKS + ROWS * (PRIVATE_CHUNKS[1] + 1)
    tree = PrefixTree(most, config.chunk_size)
    root, groups = tokens(ROOT_CHUNKS), [tokens(GROUP_CHUNKS) for _ in range(GROUPS)]
    for row in range(ROWS):
        own = tokens(int(random.integers(*PRIVATE_CHUNKS)))
        sequence = tree.insert(np.concatenate([root, groups[row % GROUPS], own]))
        tree.reserve(sequence, 1)
    return tree.rows(), tree.in_use_count


def _plan_seconds(rows: list[SequenceHandle], chunk_size: int, options: PlannerOptions) -> float:
    begin = time.perf_counter()
    plan_decode(
        [row.chunk_table for row in rows],
        [row.num_tokens for row in rows],
        chunk_size=chunk_size,
        num_chunks=1 << 20,
        options=options,
    )
    return time.perf_counter() - begin
