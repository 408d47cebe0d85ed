"""Replays of a workload, against the prefix tree and against caches of single chunks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest

from experiments.cache.policies import LRU, SIMULATED
from experiments.cache.recency import replay_free_at_once, replay_lru, replay_unbounded
from experiments.cache.simulation import simulate
from experiments.cache.touches import Replay, find_touches
from experiments.cache.workload import Workload, make_workload
from experiments.trace import BLOCK_TOKENS
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.prefix_tree import PrefixTree

SEEDS = range(24)
CHUNK_SIZES = (1, 2, 3, 8)


def random_workload(seed: int, requests: int = 25) -> Workload:
    """Short prompts that share a lot; some end inside others' chunks, some are repeated."""
    random = np.random.default_rng(seed)
    paths: list[tuple[int, ...]] = [()]
    ends: list[int] = []
    for _ in range(requests):
        path = paths[random.integers(len(paths))]
        for _ in range(random.integers(0 if path else 1, 3)):
            ends.append((ends[path[-1]] if path else 0) + int(random.integers(1, 7)))
            path = (*path, len(ends) - 1)
        paths.append(path)
    return make_workload("random", paths[1:], ends)


def prompts(workload: Workload) -> list[np.ndarray]:
    """Tokens that are equal as far as the paths are."""
    lengths = workload.ends - workload.begins
    return [np.repeat(path, lengths[list(path)]) for path in workload.paths]


def replay_tree(
    workload: Workload, chunk_size: int, pool: int, *, in_use: int = 1, retain: bool = True
) -> tuple[Replay, int]:
    """What a prefix tree does, each request being released when `in_use` others have come; and the
    most chunks that were in use."""
    tree = PrefixTree(pool, chunk_size, retain=retain)
    active = []
    hits, refused, most = [], 0, 0
    for tokens in prompts(workload):
        if len(active) == in_use:
            tree.release(active.pop(0))
        try:
            active.append(tree.insert(tokens))
        except PoolExhausted:
            refused += 1
            continue
        tree.mark_computed(active[-1], active[-1].num_tokens)
        hits.append(active[-1].num_cached_tokens // chunk_size)
        most = max(most, tree.in_use_count)
    tree.check()
    found = Replay(pool, sum(hits), int(np.count_nonzero(hits)), refused, tree.num_evicted)
    return found, most


@pytest.mark.parametrize("seed", SEEDS)
def test_lru_is_what_the_prefix_tree_does_at_every_pool_size(seed: int):
    workload = random_workload(seed)
    for chunk_size in CHUNK_SIZES:
        pools = range(1, workload.distinct_tokens // chunk_size + 3)
        expected = [replay_tree(workload, chunk_size, pool)[0] for pool in pools]
        assert replay_lru(workload, chunk_size, pools) == expected


def test_the_workloads_are_refused_evicted_and_hit_and_some_have_no_tail():
    replays, tails = [], []
    for seed in SEEDS:
        workload = random_workload(seed)
        tails.append(find_touches(workload, 2).tails)
        replays += replay_lru(workload, 2, range(3, 30))
    assert sum(replay.refused > 0 for replay in replays) > 50
    assert sum(replay.evicted_chunks > 0 for replay in replays) > 50
    assert 0.1 < np.concatenate(tails).mean() < 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("in_use", [1, 2, 7])
def test_free_at_once_is_what_the_prefix_tree_does(seed: int, in_use: int):
    workload = random_workload(seed)
    for chunk_size in CHUNK_SIZES:
        [found] = replay_free_at_once(workload, chunk_size, [in_use])
        expected, most = replay_tree(workload, chunk_size, 10_000, in_use=in_use, retain=False)
        assert found.pool_chunks == most
        assert found.hit_chunks == expected.hit_chunks
        assert found.requests_hit == expected.requests_hit
        # Nothing else would have fitted.
        assert replay_tree(workload, chunk_size, most, in_use=in_use, retain=False)[0] == found


@pytest.mark.parametrize("seed", SEEDS)
def test_without_bound_all_that_was_seen_is_found(seed: int):
    workload = random_workload(seed)
    seen: set[bytes] = set()
    hits = 0
    for tokens in prompts(workload):
        prefixes = [tokens[:end].tobytes() for end in range(3, len(tokens) + 1, 3)]
        hits += sum(prefix in seen for prefix in prefixes)
        seen.update(prefixes)
    assert replay_unbounded(workload, 3).hit_chunks == hits


def test_requests_in_use_at_the_same_time_do_not_change_what_lru_finds():
    """When prompts end with chunks: a tail in use takes a chunk."""
    for seed in SEEDS[:8]:
        workload = random_workload(seed)
        whole = Workload("", workload.paths, 2 * workload.begins, 2 * workload.ends)
        _, most = replay_tree(whole, 2, 10_000, in_use=5)
        for pool in range(most, most + 20, 3):
            one = replay_tree(whole, 2, pool)[0].hit_chunks
            assert replay_tree(whole, 2, pool, in_use=5)[0].hit_chunks == one


class ChunkCache:
    """A pool of single chunks: each knows its prefix, and is evicted by itself."""

    def __init__(self, policy: str, chunk_size: int, pool: int, following: dict[bytes, list[int]]):
        self.policy, self.chunk_size, self.pool = policy, chunk_size, pool
        self.following = following
        self.inserted: dict[bytes, int] = {}
        self.uses: dict[bytes, int] = {}
        self.aged: dict[bytes, int] = {}
        self.last: dict[bytes, int] = {}
        self.age = 0
        self.evicted = 0

    def serve(self, request: int, prefixes: list[bytes], tail: int) -> int:
        found = [prefix for prefix in prefixes if prefix in self.uses]
        while len(self.uses) + len(prefixes) - len(found) + tail > self.pool:
            parents = {prefix[: -8 * self.chunk_size] for prefix in self.uses}
            leaves = [each for each in self.uses if each not in parents and each not in prefixes]
            leaf = min(leaves, key=lambda each: (*self.key(each), self.last[each]))
            self.age = max(self.age, self.aged[leaf])
            del self.uses[leaf]
            self.evicted += 1
        for prefix in prefixes:
            if prefix not in self.uses:
                self.uses[prefix], self.inserted[prefix] = 0, request
            self.uses[prefix] += 1
            self.aged[prefix] = self.age + self.uses[prefix]
            self.last[prefix] = request
            self.following[prefix].pop(0)
        return len(found)

    def key(self, prefix: bytes) -> tuple[int, ...]:
        following = self.following[prefix]
        return {
            "lru": (),
            "fifo": (self.inserted[prefix],),
            "lfu": (self.uses[prefix],),
            "lfu-aged": (self.aged[prefix],),
            "length-aware": (self.uses[prefix], -((len(prefix) // 8 - 1) // BLOCK_TOKENS)),
            "optimal": (-following[0] if following else -(10**6),),
        }[self.policy]


def replay_chunks(workload: Workload, chunk_size: int, pool: int, policy: str) -> Replay:
    requests = [
        (
            [tokens[:end].tobytes() for end in range(chunk_size, len(tokens) + 1, chunk_size)],
            int(len(tokens) % chunk_size > 0),
        )
        for tokens in prompts(workload)
        if -(-len(tokens) // chunk_size) <= pool
    ]
    following: dict[bytes, list[int]] = {}
    for number, (prefixes, _) in enumerate(requests):
        for prefix in prefixes:
            following.setdefault(prefix, []).append(number)
    cache = ChunkCache(policy, chunk_size, pool, following)
    hits = [cache.serve(number, *request) for number, request in enumerate(requests)]
    refused = len(workload.paths) - len(requests)
    return Replay(pool, sum(hits), int(np.count_nonzero(hits)), refused, cache.evicted)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policy", ["lru", *SIMULATED])
def test_a_simulated_policy_is_what_a_cache_of_single_chunks_does(seed: int, policy: str):
    workload = random_workload(seed)
    if policy == "length-aware":  # it looks at blocks of 512 tokens
        workload = Workload("", workload.paths, 100 * workload.begins, 100 * workload.ends)
    for chunk_size in (1, 3) if policy != "length-aware" else (100, 200, 600):
        for pool in (3, 5, 8, 11, 16, 23, 40):
            touches = find_touches(workload, chunk_size, pool)
            found = simulate(touches, pool, {"lru": LRU, **SIMULATED}[policy])
            assert found == replay_chunks(workload, chunk_size, pool, policy)


def outcomes(
    cached: frozenset[bytes], prefixes: frozenset[bytes], room: int
) -> Iterator[frozenset[bytes]]:
    """All that may be cached after a request, leaf or not, when nothing goes without need."""
    others = cached - prefixes
    for kept in combinations(sorted(others), min(len(others), room - len(prefixes))):
        yield prefixes.union(kept)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pool", [4, 5, 6])
def test_no_choice_of_evictions_finds_more_than_optimal(seed: int, pool: int):
    workload = random_workload(1000 + seed, requests=12)
    most: dict[frozenset[bytes], int] = {frozenset(): 0}  # by what is cached
    for tokens in prompts(workload):
        prefixes = frozenset(tokens[:end].tobytes() for end in range(3, len(tokens) + 1, 3))
        room = pool - (len(tokens) % 3 > 0)
        if len(prefixes) > room:
            continue
        after: dict[frozenset[bytes], int] = {}
        for cached, hits in most.items():
            found = hits + len(cached & prefixes)
            for outcome in outcomes(cached, prefixes, room):
                after[outcome] = max(after.get(outcome, 0), found)
        most = after
    found = simulate(find_touches(workload, 3, pool), pool, SIMULATED["optimal"])
    assert found.hit_chunks == max(most.values())
