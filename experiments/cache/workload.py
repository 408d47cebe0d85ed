"""Requests as paths in a tree of prefixes: who shares how much with whom, without the tokens.

A request's prompt is a path of nodes, each of which stands for some tokens behind its parent's.
Nodes that exactly the same requests pass are merged to a segment, as in a radix tree: whatever a
cache does with whole chunks, it sees no difference between them. A trace of 288,500 blocks becomes
37,454 segments passed, and that is what every replay here costs, whatever its chunk size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from experiments.harness.errors import UserError
from experiments.trace import BLOCK_TOKENS, read_trace


@dataclass(frozen=True)
class Workload:
    """Requests in the order they come.

    Attributes:
      name: what it is, for titles.
      paths: the segments of each request's prompt, from its first token to its last.
      begins, ends: token positions where a segment begins and ends, in every prompt that has it.
    """

    name: str
    paths: tuple[tuple[int, ...], ...]
    begins: np.ndarray  # [segments]
    ends: np.ndarray  # [segments]

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """Of each request."""
        return self.ends[[path[-1] for path in self.paths]]

    @property
    def distinct_tokens(self) -> int:
        """What a cache without bound holds in the end."""
        return int((self.ends - self.begins).sum())


def make_workload(
    name: str, paths: Sequence[Sequence[int]], ends: Mapping[int, int] | Sequence[int]
) -> Workload:
    """A workload of paths of nodes; `ends` tells at which token position each node ends.

    A node has the same parent on every path, and no prompt is empty.
    """
    requests_through = Counter(chain.from_iterable(paths))
    segment_of: dict[int, int] = {}
    segment_begins: list[int] = []
    segment_ends: list[int] = []
    for path in paths:
        parent, begin = None, 0
        for node in path:
            if node not in segment_of:
                if parent is None or requests_through[parent] != requests_through[node]:
                    segment_of[node] = len(segment_begins)
                    segment_begins.append(begin)
                    segment_ends.append(ends[node])
                else:
                    segment_of[node] = segment_of[parent]
                    segment_ends[segment_of[node]] = ends[node]
            parent, begin = node, ends[node]
    merged = (dict.fromkeys(segment_of[node] for node in path) for path in paths)
    return Workload(
        name, tuple(map(tuple, merged)), np.array(segment_begins), np.array(segment_ends)
    )


def read_workload(path: Path, count: int | None = None) -> Workload:
    """The first `count` requests, or all, of a trace in the format of Mooncake's releases.

    Raises:
        UserError: the file cannot be read, a line is not a request, there are too few, or an id
            stands for different prefixes in two lines.
    """
    requests = read_trace(path)[:count]
    if count is not None and len(requests) < count:
        raise UserError(f"--requests {count}: --trace {path} has {len(requests)}")
    prefixes: dict[int, tuple[int | None, int]] = {}
    for line, request in enumerate(requests, 1):
        parent = None
        for index, block in enumerate(request.blocks, 1):
            end = min(index * BLOCK_TOKENS, request.input_tokens)
            if prefixes.setdefault(block, (parent, end)) != (parent, end):
                raise UserError(
                    f"--trace {path}, line {line}: hash id {block} stands for another prefix than "
                    "in a line before (its place, its length or the id before it differ); equal "
                    "ids must be equal prefixes"
                )
            parent = block
    ends = {block: end for block, (_, end) in prefixes.items()}
    return make_workload(f"trace {path.name}", [request.blocks for request in requests], ends)
