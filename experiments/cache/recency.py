"""What the engine's own policies find, computed without a cache.

Both give exactly what `jax_chunkattn.tree.prefix_tree.PrefixTree` does with the same requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from experiments.cache.touches import Replay, Touches, count_refused, find_touches
from experiments.cache.workload import Workload


def replay_unbounded(workload: Workload, chunk_size: int) -> Replay:
    """A pool without bound: the most that any policy can find."""
    touches = find_touches(workload, chunk_size)
    return touches.replayed(None, np.where(touches.previous >= 0, touches.chunks, 0), 0)


def replay_lru(workload: Workload, chunk_size: int, pools: Sequence[int]) -> list[Replay]:
    """Least recently used, leaves first, one request after another: each pool's result, in order.

    A request touches its path deepest first when it leaves. So a pool holds the most recently
    touched chunks, and a larger pool holds what a smaller one does, and more: one pass tells how
    deep in that order each chunk stood when it was touched, and a pool hits it if it is larger
    (Mattson et al., IBM Systems Journal 9 (2), 1970). Pools that refuse different requests see
    different orders; there is one pass for each.
    """
    results: dict[int, Replay] = {}
    by_refused = sorted(set(pools), reverse=True)
    for _, group in groupby(by_refused, lambda pool: count_refused(workload, chunk_size, pool)):
        alike = list(group)
        touches = find_touches(workload, chunk_size, alike[0])
        depths = _find_depths(touches)
        for pool in alike:
            hits = np.clip(pool - depths.above, 0, touches.chunks)
            inserted = int((touches.chunks - hits).sum())
            held = min(pool, depths.total) - (depths.hole <= pool)
            results[pool] = touches.replayed(pool, hits, inserted - held)
    return [results[pool] for pool in pools]


@dataclass(frozen=True)
class _Depths:
    """Attributes:
    above: chunks that stood before a touched segment's first in the order of recency, just before
      its request; more than any pool has for a segment that was never touched.
    total: length of the order in the end.
    hole: where in it a free chunk is then, counted from 1; beyond any pool if nowhere.
    """

    above: np.ndarray  # [touches]
    total: int
    hole: int


_NOWHERE = 2**62


def _find_depths(touches: Touches) -> _Depths:
    """A prompt's tail takes a chunk and leaves it free, a hole in the order of recency: a pool that
    reaches as far as the hole has a free chunk. A chunk touched from behind the hole fills it and
    leaves one where it was; a new one, of which every request with a tail has one, only fills it.
    So there is one hole at most.

    Chunks of a request stay together in the order until a later request takes those nearest to the
    root away. So all of them that were touched last by the same request are looked up together.
    """
    same_group = np.zeros(len(touches.request), bool)
    same_group[1:] = (touches.request[1:] == touches.request[:-1]) & (
        touches.previous[1:] == touches.previous[:-1]
    )
    first = np.flatnonzero(~same_group)
    group_chunks = np.add.reduceat(touches.chunks, first) if len(first) else first
    group_above = np.full(len(first), _NOWHERE)
    group_bounds = np.searchsorted(touches.request[first], np.arange(touches.num_requests + 1))

    order = _Sums(touches.num_requests)  # chunks by the request that touched them last
    hole = -1  # before all chunks touched last by this request; -1: there is none
    bounds, tails = group_bounds.tolist(), touches.tails.tolist()
    previous, chunks = touches.previous[first].tolist(), group_chunks.tolist()
    for request, tail in enumerate(tails):
        groups = range(bounds[request], bounds[request + 1])
        for group in groups:
            last = previous[group]
            if last >= 0:
                group_above[group] = order.after(last) + (hole >= last)
        for group in groups:
            order.add(request, chunks[group])
            if previous[group] >= 0:
                order.add(previous[group], -chunks[group])
        if tail:
            hole = request
        elif hole >= previous[groups[-1]]:
            hole = previous[groups[-1]]
    inside = np.cumsum(touches.chunks) - touches.chunks
    above = (group_above - inside[first])[np.cumsum(~same_group) - 1] + inside
    return _Depths(
        above, order.total + (hole >= 0), order.after(hole) + 1 if hole >= 0 else _NOWHERE
    )


class _Sums:
    """Numbers by index, and sums of those behind an index, O(log size) each (a Fenwick tree)."""

    def __init__(self, size: int) -> None:
        self.total = 0
        self._sums = [0] * (size + 1)

    def add(self, index: int, number: int) -> None:
        self.total += number
        index += 1
        while index < len(self._sums):
            self._sums[index] += number
            index += index & -index

    def after(self, index: int) -> int:
        """The sum of all numbers at higher indices."""
        behind = self.total
        index += 1
        while index:
            behind -= self._sums[index]
            index &= index - 1
        return behind


def replay_free_at_once(workload: Workload, chunk_size: int, in_use: Sequence[int]) -> list[Replay]:
    """The paper's policy, by the number of requests in use at a time: each result, in order.

    Each request is released when that many others have come, and its chunks are freed unless
    another holds them (`PrefixTree(retain=False)`). So a chunk is found if one of the requests
    still in use touched it. `pool_chunks` is the most that were in use: the pool it takes.
    """
    touches = find_touches(workload, chunk_size)
    results = []
    for count in in_use:
        gone = touches.request + count  # before which request
        hits = np.where(
            (touches.previous >= 0) & (touches.request - touches.previous < count),
            touches.chunks,
            0,
        )
        change = np.zeros(touches.num_requests + 1, np.int64)
        held_until = np.minimum(np.minimum(gone, touches.following), touches.num_requests)
        np.add.at(change, touches.request, touches.chunks)
        np.add.at(change, held_until, -touches.chunks)
        change[:-1] += touches.tails
        tail_until = np.minimum(np.arange(touches.num_requests) + count, touches.num_requests)
        np.add.at(change, tail_until, -touches.tails)
        results.append(touches.replayed(int(np.cumsum(change).max()), hits, 0))
    return results
