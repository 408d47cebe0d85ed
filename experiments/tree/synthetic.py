"""Time and memory of the prefix tree with made-up prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.harness.environment import max_rss_bytes, resident_bytes
from experiments.tree.config import TreeConfig
from jax_chunkattn.tree.nodes import SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree

_VOCABULARY = 50_000


def measure_growth(config: TreeConfig) -> tuple[list[dict[str, Any]], float, dict[str, float]]:
    """Costs at every power of ten of nodes up to `config.chunks`, in a tree of unrelated prompts.

    Returns the records, the growth of the process's resident memory per node, and the cost of
    evicting as many chunks as a prompt has from the full tree.
    """
    per_prompt = config.prompt_tokens // config.chunk_size
    tree = PrefixTree(config.chunks + 2 * per_prompt, config.chunk_size)
    prompts = _Prompts(config)
    records = []
    stored, bytes_per_node = 0, 0.0
    before = held_bytes()
    for size in _sizes(config.chunks):
        while stored == 0 or tree.num_nodes + per_prompt <= size:
            _cache(tree, prompts.make(stored))
            stored += 1
        if size == config.chunks:
            bytes_per_node = (held_bytes() - before) / tree.num_nodes
        chosen = np.random.default_rng(config.seed).integers(0, stored, config.samples)
        known = [prompts.make(int(index)) for index in chosen]
        new = [prompts.make(stored + config.chunks + index) for index in range(config.samples)]
        costs = _measure_operations(tree, known, new)
        records.append({"nodes": tree.num_nodes, "root_children": stored, **costs})
    rounds = min(config.samples, stored)
    evict = _microseconds(lambda _: tree.evict(per_prompt), range(rounds))
    return records, bytes_per_node, evict


def measure_children(config: TreeConfig, children: int) -> dict[str, Any]:
    """Costs of prompts that begin with one of the root's `children` first chunks."""
    prompts = _Prompts(config)
    per_prompt = config.prompt_tokens // config.chunk_size
    tree = PrefixTree(children + (config.samples + 2) * per_prompt, config.chunk_size)
    first = prompts.make(0)[: config.chunk_size]
    for child in range(1, children):
        _cache(tree, prompts.make(child, config.chunk_size))
    known, new = [], []
    for index in range(config.samples):
        for kind in (known, new):
            prompt = prompts.make(children + 2 * index + (kind is new))
            prompt[: config.chunk_size] = first
            kind.append(prompt)
        _cache(tree, known[-1])
    costs = _measure_operations(tree, known, new)
    return {"nodes": tree.num_nodes, "root_children": children, **costs}


def held_bytes() -> int:
    """Memory this process holds now; where the system does not tell, the most it has held."""
    return resident_bytes() or max_rss_bytes()


class _Prompts:
    """Prompt number i, always the same, unrelated to all others."""

    def __init__(self, config: TreeConfig):
        self._seed = config.seed
        self._num_tokens = config.prompt_tokens

    def make(self, index: int, num_tokens: int | None = None) -> np.ndarray:
        generator = np.random.default_rng((self._seed, index))
        return generator.integers(0, _VOCABULARY, num_tokens or self._num_tokens, np.int32)


def _sizes(largest: int) -> list[int]:
    powers = [10**exponent for exponent in range(3, 10) if 10**exponent < largest]
    return [*powers, largest]


def _cache(tree: PrefixTree, prompt: np.ndarray) -> None:
    sequence = tree.insert(prompt)
    tree.mark_computed(sequence, sequence.num_tokens)
    tree.release(sequence)


def _measure_operations(
    tree: PrefixTree, known: list[np.ndarray], new: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Microseconds per prompt; the tree stores the same afterwards.

    `known` prompts are in the tree. `new` ones are not, and leave before they are computed, so that
    releasing them removes their nodes. So do those that go apart from a known one inside its first
    chunk, which is copied as far as they agree.
    """
    apart = tree.chunk_size // 2
    alike = [np.append(old[:apart], other[apart:]) for old, other in zip(known, new, strict=True)]
    costs = {"match": _microseconds(tree.match, known)}
    active: list[SequenceHandle] = []
    costs["insert_known"] = _microseconds(lambda prompt: active.append(tree.insert(prompt)), known)
    costs["release_known"] = _microseconds(tree.release, active)
    costs["insert_new"], costs["remove_new"] = _measure_new(tree, new)
    costs["insert_copying"], _ = _measure_new(tree, alike, copy_partial=True)
    return costs


def _measure_new(
    tree: PrefixTree, new: list[np.ndarray], *, copy_partial: bool = False
) -> tuple[dict[str, float], ...]:
    """One at a time, so that the pool needs room for one more prompt only."""
    inserts, removals = [], []
    for prompt in new:
        begin = time.perf_counter()
        sequence = tree.insert(prompt, copy_partial=copy_partial)
        middle = time.perf_counter()
        tree.release(sequence)
        removals.append(time.perf_counter() - middle)
        inserts.append(middle - begin)
    return quantiles(inserts), quantiles(removals)


def _microseconds(operation: Callable[[Any], object], arguments: Iterable[Any]) -> dict[str, float]:
    seconds = []
    for argument in arguments:
        begin = time.perf_counter()
        operation(argument)
        seconds.append(time.perf_counter() - begin)
    return quantiles(seconds)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in microseconds."""
    median, high = np.quantile(seconds, [0.5, 0.95]) * 1e6
    return {"median": round(float(median), 2), "p95": round(float(high), 2)}
