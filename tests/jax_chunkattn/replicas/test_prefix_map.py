"""The router's map against sets of prefixes, one for each replica."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jax_chunkattn.replicas.prefix_map import PrefixMap
from jax_chunkattn.tree.kv_events import KVEvents, hash_chunk, hash_chunks
from jax_chunkattn.tree.prefix_tree import PrefixTree

CHUNK = 2
REPLICAS = 11  # more than a byte has bits
FIRST = int.from_bytes(bytes.fromhex("a8b47425857d35ff"), "little")


def prompt(choose: random.Random) -> list[int]:
    return [choose.randrange(2) for _ in range(choose.randrange(1, 12))]


def depth_in(tree: PrefixTree, tokens: list[int], salt: bytes) -> int:
    return tree.match(tokens, salt).num_computed_tokens // CHUNK


def test_with_events_it_knows_what_each_tree_would_find():
    choose, caches = random.Random(0), [KVEvents() for _ in range(REPLICAS)]
    trees = [PrefixTree(9, CHUNK, observers=[cache]) for cache in caches]
    known, evicted = PrefixMap(1000), 0
    for step in range(2_000):
        place, tokens, salt = choose.randrange(REPLICAS), prompt(choose), choose.choice([b"", b"s"])
        sequence = trees[place].insert(tokens, salt)
        if choose.random() < 0.9:
            trees[place].mark_computed(sequence, len(tokens))
        trees[place].release(sequence)
        if step % 501 == 500:
            trees[place].reset()
        for replica, cache in enumerate(caches):
            known.apply(replica, cache.take())
        asked = prompt(choose)
        depths = known.lookup(hash_chunks(asked, CHUNK, salt), REPLICAS)
        assert depths.tolist() == [depth_in(tree, asked, salt) for tree in trees]
        evicted += sum(tree.num_evicted for tree in trees)
    assert evicted
    assert len(known) <= sum(tree.num_nodes for tree in trees)
    for replica in range(REPLICAS):
        known.clear(replica)
    assert len(known) == 0


def test_what_is_on_its_way_counts_until_the_last_such_request_is_there():
    known, hashes = PrefixMap(100), hash_chunks(range(8), CHUNK)
    known.expect(3, hashes)
    known.expect(3, hashes[:2])
    assert known.lookup(hashes, 5).tolist() == [0, 0, 0, 4, 0]
    known.arrived(3, hashes)
    assert known.lookup(hashes, 5).tolist() == [0, 0, 0, 2, 0]
    known.hold(3, hashes[:1])
    known.arrived(3, hashes[:2])
    assert known.lookup(hashes, 5).tolist() == [0, 0, 0, 1, 0]
    assert len(known) == 1


def test_what_was_used_last_is_kept_and_of_a_path_what_is_nearest_to_the_root():
    known = PrefixMap(6)
    first, second = hash_chunks([1] * 8, CHUNK), hash_chunks([2] * 8, CHUNK)
    known.hold(0, first)
    known.hold(1, second)
    assert (len(known), known.forgotten) == (6, 2)
    assert known.lookup(second, 2).tolist() == [0, 4]
    assert known.lookup(first, 2).tolist() == [2, 0]
    known.hold(0, hash_chunks([3] * 6, CHUNK))
    assert known.lookup(first, 2).tolist() == [2, 0]
    assert known.lookup(second, 2).tolist() == [0, 1]


def test_hashes_are_the_same_in_every_process():
    """The first was computed by `b2sum -l 64`, over 8 bytes of zeros and the two tokens."""
    assert hash_chunk(0, np.array([1, 2], np.int32).tobytes()) == FIRST
    assert hash_chunks([1, 2, 3], CHUNK) == [FIRST]
    assert hash_chunks([1, 2, 3, 4], CHUNK)[1] == hash_chunk(
        FIRST, np.array([3, 4], np.int32).tobytes()
    )
    assert hash_chunks([1, 2], CHUNK, b"tenant") != [FIRST]


def test_a_map_without_room_is_refused():
    with pytest.raises(ValueError, match="max_chunks"):
        PrefixMap(0)
    with pytest.raises(ValueError, match="most_waiting"):
        KVEvents(most_waiting=0)
