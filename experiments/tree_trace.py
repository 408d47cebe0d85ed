"""Replaying the prompts of a recorded service into the prefix tree."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.errors import UserError
from experiments.trace import BLOCK_TOKENS, read_lines
from experiments.tree_synthetic import held_bytes
from jax_chunkattn.allocator import PoolExhausted
from jax_chunkattn.prefix_tree import PrefixTree


def read_trace(path: Path) -> list[np.ndarray]:
    """The ids of the blocks of each request's prompt, in the order of arrival.

    Raises:
        UserError: the file cannot be read, or a line is not a request.
    """
    requests = list(read_lines(path, _blocks))
    if not requests:
        raise UserError(f"--trace {path} holds no requests")
    return requests


def _blocks(request: Any) -> np.ndarray:
    blocks = np.array(request["hash_ids"], np.int32)
    if blocks.ndim != 1 or not blocks.size or blocks.min() < 0:
        raise ValueError("hash_ids must be a list of ids from 0 up")
    return blocks


def replay(requests: list[np.ndarray], num_chunks: int | None) -> dict[str, Any]:
    """Serve the requests one after another from a pool of `num_chunks` blocks (None: no bound).

    Every id stands for a whole block of tokens, the last of a prompt included, as the trace counts
    them. Outputs are not replayed: the trace does not identify them. A prompt longer than the pool
    is refused and hits nothing. The time is that of the tree alone.
    """
    num_blocks = sum(blocks.size for blocks in requests)
    before = held_bytes()
    tree = PrefixTree(num_chunks or num_blocks, BLOCK_TOKENS)
    hits = refused = 0
    seconds = 0.0
    for blocks in requests:
        tokens = np.repeat(blocks, BLOCK_TOKENS)
        begin = time.perf_counter()
        try:
            sequence = tree.insert(tokens)
        except PoolExhausted:
            refused += 1
            continue
        tree.mark_computed(sequence, sequence.num_tokens)
        tree.release(sequence)
        seconds += time.perf_counter() - begin
        hits += sequence.num_cached_tokens // BLOCK_TOKENS
    return {
        "pool_chunks": num_chunks,
        "requests": len(requests),
        "refused": refused,
        "blocks": num_blocks,
        "hit_blocks": hits,
        "hit_rate": hits / num_blocks,
        "evicted_blocks": tree.num_evicted,
        "nodes": tree.num_nodes,
        "bytes_per_node": (held_bytes() - before) / tree.num_nodes if not num_chunks else None,
        "requests_per_second": (len(requests) - refused) / seconds,
        "blocks_per_second": num_blocks / seconds,
        "seconds": seconds,
    }
