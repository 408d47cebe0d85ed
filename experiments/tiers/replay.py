"""A trace of requests replayed into the real prefix tree with tiers behind it, without a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.tiers.config import TiersConfig
from experiments.trace import BLOCK_TOKENS, TraceRequest, read_trace
from jax_chunkattn.tiers.host import HostTier
from jax_chunkattn.tree.nodes import Node
from jax_chunkattn.tree.prefix_tree import PrefixTree

NOTHING = np.empty(0, np.uint8)
"""In the place of a chunk."""


def measure_trace(config: TiersConfig, folder: ResultFolder) -> dict[str, Any]:
    """What a pool finds alone, and with either tier behind it, and with both."""
    assert config.trace is not None, "asked where there is one"
    began = time.perf_counter()
    environment = describe_environment()
    requests = [one for one in read_trace(config.trace) if one.input_tokens >= BLOCK_TOKENS]
    if not requests:
        raise UserError(
            f"{config.trace} has no request with a whole block of {BLOCK_TOKENS} tokens"
        )
    folder.begin(environment)
    sizes = [
        {"pool": config.pool_tokens, "host": host, "disk": disk}
        for host in (0, config.host_tokens)
        for disk in (0, config.disk_tokens)
    ]
    units = {
        f"{one['host']:,} in memory, {one['disk']:,} on disk": lambda one=one: {
            "kind": "replay",
            **replay(requests, **one),
        }
        for one in sizes
    }
    records = measure_units(folder, units, "replaying")
    summary = {
        "experiment": "tiers",
        "trace": str(config.trace),
        "requests": len(requests),
        "replays": [
            {name: value for name, value in one.items() if name != "kind"} for one in records
        ],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def replay(requests: Sequence[TraceRequest], *, pool: int, host: int, disk: int) -> dict[str, Any]:
    """Tokens of the prompts by where they are found, in whole blocks, for sizes in tokens.

    Requests come one after another; each is in the pool as a whole while it is served. One that the
    pool could never hold is computed, and leaves nothing.
    """
    sizes = {"pool": pool, "host": host, "disk": disk}
    blocks = {name: size // BLOCK_TOKENS for name, size in sizes.items()}
    tiers = _Behind(HostTier(blocks["host"]), HostTier(blocks["disk"]))
    tree = PrefixTree(blocks["pool"], 1, observers=[tiers])
    found = dict.fromkeys(blocks, 0)
    total = 0
    for request in requests:
        ids = request.blocks[: request.input_tokens // BLOCK_TOKENS]
        total += request.input_tokens
        if len(ids) > blocks["pool"]:
            continue
        there = tree.match(ids).num_computed_tokens
        found["pool"] += there
        for name, count in tiers.load(ids[there:]).items():
            found[name] += count
        sequence = tree.insert(ids)
        tree.mark_computed(sequence, len(ids))
        tree.release(sequence)
    return {
        "sizes": sizes,
        "tokens": total,
        "found": {name: count * BLOCK_TOKENS for name, count in found.items()},
    }


@dataclass
class _Behind:
    """Tiers that keep no chunks, only which: those evicted in memory, all that is computed on the
    disk, as an engine does. What is used longest ago makes room in both."""

    host: HostTier
    disk: HostTier

    def load(self, ids: Sequence[int]) -> Mapping[str, int]:
        """How many of the first of these are in each, up to the first that is in none."""
        counts = {"host": 0, "disk": 0}
        for name in map(_name, ids):
            if self.host.use(name) is not None:
                counts["host"] += 1
            elif self.disk.use(name) is not None:
                counts["disk"] += 1
            else:
                break
        return counts

    def stored(self, node: Node) -> None:
        if self.disk.use(node.key[8:]) is None:
            self.disk.put(node.key[8:], NOTHING)

    def evicting(self, node: Node) -> None:
        for name, _ in self.host.put(node.key[8:], NOTHING):
            if self.disk.use(name) is None:
                self.disk.put(name, NOTHING)

    def removed(self, node: Node) -> None:
        pass

    def cleared(self) -> None:
        pass


def _name(block: int) -> bytes:
    """As the tree has it: an id names all blocks up to its own."""
    return np.int32(block).tobytes()
