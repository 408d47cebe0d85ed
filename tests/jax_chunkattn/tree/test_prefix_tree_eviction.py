"""PrefixTree: what stays when sequences leave, what is evicted, and full pools."""

from __future__ import annotations

import pytest

from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.tree.tree_helpers import A, B, C, D, cache, insert_computed, sizes, state

# Leaving.


def test_released_chunks_stay_cached_and_the_private_ones_are_freed():
    tree = PrefixTree(16, 4)
    sequence = insert_computed(tree, A + B + [7])
    tree.reserve(sequence, 8)
    tree.release(sequence)
    assert sizes(tree) == (14, 2, 0)
    assert insert_computed(tree, A + B + [8]).num_cached_tokens == 8


def test_without_retain_chunks_go_with_their_last_sequence():
    tree = PrefixTree(16, 4, retain=False)
    first = insert_computed(tree, A + B)
    second = insert_computed(tree, A + C)
    tree.release(first)
    assert tree.match(A + B).num_tokens == 4
    tree.release(second)
    assert sizes(tree) == (16, 0, 0)


def test_a_released_handle_is_dead():
    tree, other_tree = PrefixTree(16, 4), PrefixTree(16, 4)
    sequence = insert_computed(tree, [*A, 2])
    with pytest.raises(ValueError, match="not active"):
        other_tree.release(sequence)
    tree.release(sequence)
    for use in (
        lambda: tree.release(sequence),
        lambda: tree.append(sequence, [2]),
        lambda: tree.reserve(sequence, 1),
        lambda: tree.fork(sequence),
        lambda: tree.mark_computed(sequence, 1),
        lambda: tree.computed_tokens(sequence),
    ):
        with pytest.raises(ValueError, match="not active"):
            use()
    assert sizes(tree) == (15, 1, 0)


# Eviction.


def test_eviction_takes_the_least_recently_used_leaf_first():
    tree = PrefixTree(16, 4)
    cache(tree, A + B)
    cache(tree, A + C)
    cache(tree, D)
    cache(tree, A + B)  # used again: now the most recent
    order = [A + C, D, A + B, A]
    for position, path in enumerate(order):
        assert tree.match(path).num_tokens == len(path)
        assert tree.evict(1) == 1
        assert tree.match(path).num_tokens < len(path)
        assert all(tree.match(later).num_tokens == len(later) for later in order[position + 1 :])
        tree.check()
    assert tree.evict(1) == 0
    assert tree.num_evicted == 4


def test_nothing_in_use_nor_above_it_is_evicted():
    tree = PrefixTree(16, 4)
    cache(tree, A + B + C)
    cache(tree, A + D)
    sequence = insert_computed(tree, A + B)
    assert tree.evict(16) == 2
    assert tree.match(A + B + C).chunk_ids == tuple(sequence.chunk_ids)
    assert sizes(tree) == (14, 0, 2)
    assert tree.evict(-3) == 0


def test_insert_evicts_only_what_it_needs():
    tree = PrefixTree(4, 4)
    cache(tree, A + B)
    cache(tree, C)
    insert_computed(tree, D + D)
    assert sizes(tree) == (0, 2, 2)
    assert tree.match(A + B).num_tokens == 4
    assert tree.match(C).num_tokens == 4


def test_insert_does_not_evict_what_it_matched():
    tree = PrefixTree(3, 4)
    chunk_ids = cache(tree, A + B)
    cache(tree, C)
    sequence = insert_computed(tree, A + B + D)
    assert sequence.chunk_ids[:2] == chunk_ids
    assert sizes(tree) == (0, 0, 3)


def test_insert_that_evicts_all_of_its_own_salt():
    tree = PrefixTree(2, 4)
    cache(tree, A + B)
    sequence = insert_computed(tree, C + D)
    assert tree.match(C + D).chunk_ids == tuple(sequence.chunk_ids)


@pytest.mark.parametrize(
    "operation",
    [
        lambda tree, sequence: tree.insert(A + B + C + D),
        lambda tree, sequence: tree.insert([1, 1, *C, *D, *D], copy_partial=True),
        lambda tree, sequence: tree.insert(D + D + D, b"new salt"),
        lambda tree, sequence: tree.reserve(sequence, 16),
    ],
)
def test_a_full_pool_changes_nothing(operation):
    tree = PrefixTree(6, 4)
    cache(tree, A + B)
    insert_computed(tree, D)
    sequence = insert_computed(tree, [*C, 7])
    tree.reserve(sequence, 4)
    before = state(tree)
    with pytest.raises(PoolExhausted, match=r"0 are free and [02] can be evicted"):
        operation(tree, sequence)
    assert state(tree) == before


def test_fork_in_a_full_pool_changes_nothing():
    tree = PrefixTree(2, 4)
    sequence = insert_computed(tree, [*A, 7])
    before = state(tree)
    with pytest.raises(PoolExhausted):
        tree.fork(sequence)
    assert state(tree) == before


def test_a_prompt_that_can_never_fit_is_told_apart():
    tree = PrefixTree(2, 4)
    cache(tree, A + B)
    with pytest.raises(PoolExhausted, match="9 tokens take 3 chunks of 4 and can never fit"):
        tree.insert(A + B + [7])


def test_reset_forgets_everything_but_lets_active_sequences_go_on():
    tree = PrefixTree(16, 4)
    cache(tree, C)
    old = insert_computed(tree, [*A, 2])
    assert tree.reset() == 1
    assert tree.match(A).num_tokens == 0
    new = insert_computed(tree, [*A, 2])
    assert new.num_cached_tokens == 0
    tree.append(old, [2, 2, 2])
    tree.append(new, [2, 2, 2])
    assert not set(old.chunk_ids) & set(new.chunk_ids)
    tree.check()
    tree.release(old)
    assert sizes(tree) == (14, 0, 2)
    assert tree.match(A + B).chunk_ids == tuple(new.chunk_ids)
    tree.reset()
    tree.release(new)
    assert sizes(tree) == (16, 0, 0)
