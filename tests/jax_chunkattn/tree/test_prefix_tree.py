"""PrefixTree: matching, computing, growing, forking, and the order of rows."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.tree.tree_helpers import A, B, C, D, cache, insert_computed, sizes, state

# Matching.


def test_prefix_is_shared_in_whole_chunks():
    tree = PrefixTree(16, 4)
    first = insert_computed(tree, A + B + [7, 7])
    second = insert_computed(tree, A + B + [7, 8])
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 8
    assert first.chunk_ids[:2] == second.chunk_ids[:2]
    assert first.chunk_ids[2] != second.chunk_ids[2]
    assert sizes(tree) == (12, 0, 4)


def test_match_reports_the_path_and_changes_nothing():
    tree = PrefixTree(16, 4)
    chunk_ids = cache(tree, A + B + C)
    cache(tree, D)
    before = state(tree)
    match = tree.match(A + B + D)
    assert match.chunk_ids == tuple(chunk_ids[:2])
    assert (match.num_tokens, match.num_computed_tokens) == (8, 8)
    assert tree.match(A + B + C).num_tokens == 12
    assert tree.match(A + B + C + D[:3]).num_tokens == 12
    assert tree.match(A[:3]).num_tokens == 0
    assert tree.match(B).num_tokens == 0
    assert state(tree) == before


def test_equal_chunks_in_different_places_are_different_nodes():
    tree = PrefixTree(16, 4)
    assert len(set(cache(tree, A + A + A))) == 3
    assert tree.match(A + A + A + A).num_tokens == 12


@pytest.mark.parametrize("tokens", [np.array(A + B), np.array(A + B, np.uint16), tuple(A + B)])
def test_tokens_come_in_any_integer_sequence(tokens):
    tree = PrefixTree(8, 4)
    cache(tree, A + B)
    assert tree.match(tokens).num_tokens == 8


def test_large_token_ids_are_told_apart():
    tree = PrefixTree(8, 1)
    cache(tree, [2**31 - 1])
    assert tree.match([2**31 - 1]).num_tokens == 1
    assert tree.match([2**16 - 1]).num_tokens == 0


def test_salts_never_share():
    tree = PrefixTree(16, 4)
    mine = insert_computed(tree, A + B, b"mine")
    yours = insert_computed(tree, A + B, b"yours")
    assert not set(mine.chunk_ids) & set(yours.chunk_ids)
    assert (mine.salt, yours.salt) == (b"mine", b"yours")
    assert tree.match(A + B).num_tokens == 0
    assert tree.match(A + B, b"mine").chunk_ids == tuple(mine.chunk_ids)


def test_a_salt_leaves_nothing_behind():
    tree = PrefixTree(16, 4)
    for number in range(5):
        cache(tree, A + B + [number], salt=b"%d" % number)
    assert len(tree._stored.roots) == 5
    tree.evict(16)
    assert not tree._stored.roots
    assert sizes(tree) == (16, 0, 0)


# What is not computed yet.


def test_requests_arriving_together_share_pending_chunks():
    tree = PrefixTree(16, 4)
    first = tree.insert(A + B + [7])
    second = tree.insert(A + B + [8])
    assert second.num_cached_tokens == 8
    assert tree.computed_tokens(second) == 0
    assert tree.match(A + B).num_computed_tokens == 0
    tree.mark_computed(first, 9)
    assert tree.computed_tokens(first) == 9
    assert tree.computed_tokens(second) == 8
    assert tree.match(A + B).num_computed_tokens == 8
    tree.check()


def test_computed_in_pieces():
    tree = PrefixTree(16, 4)
    sequence = tree.insert(A + B + [7, 7])
    for num_tokens, expected in [(3, 0), (4, 4), (7, 4), (9, 9), (4, 9), (10, 10)]:
        tree.mark_computed(sequence, num_tokens)
        assert tree.computed_tokens(sequence) == expected
        tree.check()
    for num_tokens in (-1, 11):
        with pytest.raises(ValueError, match="computed of 10"):
            tree.mark_computed(sequence, num_tokens)


def test_aborted_before_computing_is_not_cached():
    tree = PrefixTree(16, 4)
    sequence = tree.insert(A + B + [7])
    tree.mark_computed(sequence, 5)
    tree.release(sequence)
    assert tree.match(A + B).num_tokens == 4
    assert sizes(tree) == (15, 1, 0)


def test_a_pending_chunk_survives_its_author_while_another_needs_it():
    tree = PrefixTree(16, 4)
    author = tree.insert(A + B)
    other = tree.insert(A + B + [7])
    tree.release(author)
    assert tree.computed_tokens(other) == 0
    assert other.num_cached_tokens == 8
    assert sizes(tree) == (13, 0, 3)
    tree.release(other)
    assert sizes(tree) == (16, 0, 0)
    assert tree.match(A).num_tokens == 0


# Growing.


def test_a_tail_that_fills_can_be_matched():
    tree = PrefixTree(16, 4)
    sequence = insert_computed(tree, [*A, 2, 2])
    before = tree.version
    assert not tree.append(sequence, [2])
    assert tree.version == before
    assert tree.match(A + B).num_tokens == 4
    assert tree.append(sequence, [2])
    assert tree.version != before
    assert tree.match(A + B).chunk_ids == tuple(sequence.chunk_ids)
    assert sequence.num_tail_tokens == 0
    tree.check()


def test_append_seals_several_chunks_at_once():
    tree = PrefixTree(16, 4)
    sequence = insert_computed(tree, [1])
    assert tree.reserve(sequence, 12)
    assert tree.append(sequence, [1, 1, 1, *B, *C, 4])
    assert tree.match(A + B + C + D).num_tokens == 12
    assert (sequence.num_tokens, sequence.num_tail_tokens) == (13, 1)
    tree.check()


def test_append_needs_reserved_room_and_computed_tokens():
    tree = PrefixTree(16, 4)
    sequence = tree.insert([*A, 2])
    with pytest.raises(ValueError, match="mark_computed"):
        tree.append(sequence, [2])
    tree.mark_computed(sequence, 5)
    before = state(tree)
    with pytest.raises(ValueError, match="reserve"):
        tree.append(sequence, [2, 2, 2, 2])
    with pytest.raises(ValueError, match="negative"):
        tree.append(sequence, [-2])
    assert state(tree) == before


def test_reserve_adds_only_what_is_missing():
    tree = PrefixTree(16, 4)
    sequence = insert_computed(tree, [*A, 2])
    version = tree.version
    assert not tree.reserve(sequence, 3)
    assert tree.version == version
    assert tree.reserve(sequence, 4)
    assert tree.version != version
    assert len(sequence.chunk_ids) == 3
    assert not tree.reserve(sequence, 7)
    full = insert_computed(tree, B)
    assert tree.reserve(full, 1)
    with pytest.raises(ValueError, match="cannot reserve -1"):
        tree.reserve(full, -1)
    tree.check()


def test_sequences_that_grow_alike_are_joined():
    tree = PrefixTree(16, 4)
    first = insert_computed(tree, [*A, 2])
    second = insert_computed(tree, [*A, 2])
    tree.append(first, [2, 2, 2])
    assert tree.append(second, [2, 2, 2])
    assert first.chunk_ids == second.chunk_ids
    assert sizes(tree) == (14, 0, 2)


def test_a_tail_may_join_a_cached_chunk():
    tree = PrefixTree(16, 4)
    chunk_ids = cache(tree, A + B)
    sequence = insert_computed(tree, [*A, 2])
    tree.append(sequence, [2, 2, 2])
    assert sequence.chunk_ids == chunk_ids
    assert sizes(tree) == (14, 0, 2)


def test_a_full_tail_waits_while_its_twin_is_pending():
    tree = PrefixTree(16, 4)
    grower = insert_computed(tree, [*A, 2])
    tree.reserve(grower, 8)
    pending = tree.insert(A + B)
    assert not tree.append(grower, [2, 2, 2])
    assert grower.num_tail_tokens == 4
    assert grower.chunk_ids[1] != pending.chunk_ids[1]
    copy, copies = tree.fork(grower)
    assert copies == [(grower.chunk_ids[1], copy.chunk_ids[1])]
    tree.check()
    tree.mark_computed(pending, 8)
    assert tree.append(grower, [3])
    assert grower.chunk_ids[1] == pending.chunk_ids[1]
    tree.check()


def test_a_full_tail_takes_the_place_of_a_twin_that_was_aborted():
    tree = PrefixTree(16, 4)
    grower = insert_computed(tree, [*A, 2])
    tree.reserve(grower, 8)
    pending = tree.insert(A + B)
    tree.append(grower, [2, 2, 2])
    tree.release(pending)
    assert tree.match(A + B).num_tokens == 4
    assert tree.append(grower, C)
    assert tree.match(A + B + C).num_tokens == 12
    tree.check()


# Forks.


def test_fork_shares_sealed_chunks_and_copies_the_tail():
    tree = PrefixTree(16, 4)
    parent = insert_computed(tree, A + B + [7])
    tree.reserve(parent, 8)
    child, copies = tree.fork(parent)
    assert child.chunk_ids[:2] == parent.chunk_ids[:2]
    assert copies == [(parent.chunk_ids[2], child.chunk_ids[2])]
    assert len(child.chunk_ids) == 3
    assert child.num_tokens == child.num_cached_tokens == 9
    tree.append(parent, [7, 7, 7])
    tree.append(child, [8, 8, 8])
    tree.release(parent)
    assert tree.match(A + B + [7, 8, 8, 8]).num_tokens == 12
    tree.check()


def test_fork_of_whole_chunks_copies_nothing():
    tree = PrefixTree(4, 4)
    parent = insert_computed(tree, A + B)
    child, copies = tree.fork(parent)
    assert copies == []
    assert child.chunk_ids == parent.chunk_ids
    assert sizes(tree) == (2, 0, 2)


# Rows.


def test_rows_under_any_node_are_contiguous():
    tree = PrefixTree(64, 4)
    prompts = [A + B, C, A + C, A, A + B + [7], C + D, A + B + D, [*C, 7], [7], A + C + [8]]
    sequences = [insert_computed(tree, prompt) for prompt in prompts]
    rows = tree.rows()
    assert set(rows) == set(sequences)
    for chunk_id in {chunk_id for sequence in sequences for chunk_id in sequence.chunk_ids}:
        covered = [index for index, row in enumerate(rows) if chunk_id in row.chunk_ids]
        assert covered == list(range(covered[0], covered[0] + len(covered)))


def test_rows_keep_insertion_order_among_equals_and_follow_changes():
    tree = PrefixTree(16, 4)
    first, second, third = (insert_computed(tree, [*A, 2]) for _ in range(3))
    assert tree.rows() == [first, second, third]
    tree.append(second, [2, 2, 2])
    assert tree.rows() == [first, third, second]
    tree.release(first)
    assert tree.rows() == [third, second]
    tree.rows().clear()
    assert len(tree.rows()) == 2


def test_some_rows_are_in_the_order_of_all():
    tree = PrefixTree(64, 4)
    prompts = [C, A + B, [*A, 2], [*A, 2], A + C, [*A, 2], D, A + B + [7], A, A]
    sequences = [insert_computed(tree, prompt) for prompt in prompts]
    gone = insert_computed(tree, B)
    tree.release(gone)
    few, many = {*sequences[2:6:3], sequences[9], gone}, {*sequences[1:], gone}
    ordered_before = [tree.in_order(some) for some in (few, many)]
    rows = tree.rows()
    for some, before in zip((few, many), ordered_before, strict=True):
        assert before == tree.in_order(some) == [row for row in rows if row in some]
        assert len(before) == len(some) - 1


def test_version_stands_while_rows_and_chunks_stand():
    tree = PrefixTree(16, 4)
    cache(tree, D)
    sequence = insert_computed(tree, [*A, 2])
    version = tree.version
    tree.match(A)
    tree.mark_computed(sequence, 5)
    tree.append(sequence, [2])
    tree.evict(1)
    tree.rows()
    assert tree.version == version
    for change in (
        lambda: tree.insert(B),
        lambda: tree.fork(sequence),
        lambda: tree.reserve(sequence, 4),
        lambda: tree.append(sequence, [2, 2]),
        lambda: tree.release(sequence),
    ):
        change()
        assert tree.version > version
        version = tree.version
