"""PrefixTree: the part of a chunk that another chunk begins with too is copied, not computed."""

from __future__ import annotations

import random

import pytest

from jax_chunkattn.tree.nodes import PartialCopy, SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.tree.tree_helpers import (
    A,
    B,
    C,
    D,
    SlotPool,
    cache,
    sizes,
    state,
)


class Device:
    """A tree of chunks of 4 tokens and a pool that remembers which prefix each slot is of."""

    def __init__(self, num_chunks: int, *, retain: bool = True):
        self.tree = PrefixTree(num_chunks, 4, retain=retain)
        self.pool = SlotPool(num_chunks, 4)

    def insert(self, tokens: list[int], like: SequenceHandle | None = None) -> SequenceHandle:
        sequence = self.tree.insert(tokens, copy_partial=True, like=like)
        self.tree.check()
        return sequence

    def compute(self, sequence: SequenceHandle, tokens: list[int]) -> None:
        """Prefills what is missing."""
        begin = self.tree.computed_tokens(sequence)
        contents = [tuple(tokens[:end]) for end in range(begin + 1, len(tokens) + 1)]
        self.pool.write(sequence.chunk_ids, begin, contents)
        self.tree.mark_computed(sequence, len(tokens))
        self.tree.check()

    def cache(self, tokens: list[int]) -> list[int]:
        sequence = self.tree.insert(tokens)
        self.compute(sequence, tokens)
        self.tree.release(sequence)
        return sequence.chunk_ids[: len(sequence.nodes)]

    def carry_out(self, *sequences: SequenceHandle) -> None:
        self.pool.copy([sequence.copy for sequence in sequences if sequence.copy is not None])

    def holds(self, sequence: SequenceHandle, tokens: list[int]) -> bool:
        """Whether each of the tokens is where it should be."""
        slots = self.pool.read(sequence.chunk_ids, len(tokens))
        return slots == [tuple(tokens[:end]) for end in range(1, len(tokens) + 1)]


# Which part, and from where.


@pytest.mark.parametrize(
    ("prompt", "num_matched", "num_copied"),
    [
        ([*A, 2, 2, 9, 9, *C], 4, 2),  # into a node
        ([*A, 2, 2, 2, 9], 4, 3),
        ([*A, 2, 9, 9], 4, 1),  # into a tail
        ([1, 1, 9, 9], 0, 2),  # below the root
        ([1, 1, 9], 0, 2),
    ],
)
def test_what_a_prompt_shares_with_a_chunk_is_copied(prompt, num_matched: int, num_copied: int):
    device = Device(16)
    chunk_ids = device.cache(A + B)
    sequence = device.insert(prompt)
    position = num_matched // 4
    assert sequence.copy == PartialCopy(
        chunk_ids[position], sequence.chunk_ids[position], num_copied
    )
    assert device.tree.computed_tokens(sequence) == num_matched + num_copied
    assert sequence.num_cached_tokens == num_matched + num_copied
    device.carry_out(sequence)
    device.compute(sequence, prompt)
    assert device.holds(sequence, prompt)
    assert device.tree.computed_tokens(sequence) == len(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        A + B,  # whole chunks cover it
        A,
        [*A, 9, 2, 2, 2],  # not even the first token
        [9, 1, 1, 1],
        A + B + C,  # below a leaf
    ],
)
def test_nothing_is_copied_where_nothing_begins_alike(prompt):
    tree = PrefixTree(16, 4)
    cache(tree, A + B)
    assert tree.match(prompt).num_copyable_tokens == 0
    sequence = tree.insert(prompt, copy_partial=True)
    assert sequence.copy is None
    assert tree.computed_tokens(sequence) == sequence.num_cached_tokens


def test_nothing_is_copied_unless_asked_for():
    tree = PrefixTree(16, 4)
    cache(tree, A + B)
    sequence = tree.insert([*A, 2, 2])
    assert sequence.copy is None
    assert sequence.num_cached_tokens == tree.computed_tokens(sequence) == 4


def test_match_tells_what_could_be_copied_and_changes_nothing():
    tree = PrefixTree(16, 4)
    cache(tree, A + B)
    before = state(tree)
    assert tree.match([*A, 2, 2, 9]).num_copyable_tokens == 2
    assert tree.match([*A, 2, 2, 9]).num_tokens == 4
    assert tree.match([1, 1]).num_copyable_tokens == 2
    assert tree.match([1, 1], b"unknown salt").num_copyable_tokens == 0
    assert state(tree) == before


def test_a_tail_that_a_chunk_contains_needs_nothing_computed():
    device = Device(16)
    device.cache(A + B)
    prompt = [*A, 2, 2, 2]
    sequence = device.insert(prompt)
    assert device.tree.computed_tokens(sequence) == sequence.num_tokens == 7
    device.carry_out(sequence)
    assert device.holds(sequence, prompt)
    device.tree.append(sequence, [9])
    assert device.tree.match([*prompt, 9]).num_computed_tokens == 8
    device.tree.check()


def test_the_chunk_that_begins_most_alike_is_found_among_many():
    chooser = random.Random(0)
    tree = PrefixTree(300, 4)
    children = {tuple(chooser.choices([1, 2, 256, 65536], k=4)) for _ in range(150)}
    for child in children:
        cache(tree, [*A, *child])
    while len(children) > 5:
        beginnings = {child[:length] for child in children for length in range(4)}
        for _ in range(50):
            prompt = (*chooser.choices([1, 2, 256, 65536], k=3), 9)
            expected = max(length for length in range(4) if prompt[:length] in beginnings)
            assert tree.match([*A, *prompt]).num_copyable_tokens == expected
        tree.evict(len(children) // 2)
        tree.check()
        children = {child for child in children if tree.match([*A, *child]).num_tokens == 8}


def test_an_evicted_chunk_gives_nothing_and_its_neighbour_the_rest():
    tree = PrefixTree(16, 4)
    cache(tree, [*A, 2, 2, 2, 1])
    cache(tree, [*A, 2, 2, 1, 1])
    cache(tree, [*A, 2, 1, 1, 1])
    for expected in (3, 2, 1, 0):
        assert tree.match([*A, 2, 2, 2, 9]).num_copyable_tokens == expected
        tree.evict(1)
        tree.check()


def test_a_donor_keeps_its_place_in_the_order_of_eviction():
    tree = PrefixTree(16, 4)
    cache(tree, A)
    cache(tree, B)
    tree.insert([1, 1, 9], copy_partial=True)
    tree.evict(1)
    assert tree.match(A).num_tokens == 0
    assert tree.match(B).num_tokens == 4


@pytest.mark.parametrize(
    ("first", "computed", "second", "num_copied"),
    [
        ([*A, 2, 2, 3], 7, [*A, 2, 2, 9, 9, *C], 2),
        ([*A, 2, 2, 3], 5, [*A, 2, 2, 9], 1),  # no more is computed
        ([2, 2, 3], 3, [2, 2, 3, 3, *C], 3),  # of the first chunk
        ([*A, 2, 2, 3], 7, [*B, 2, 2, 9], 0),  # behind another chunk
        ([*A, 2, 2, 3], 7, [*A, *B, 2, 9], 2),  # as B begins too
    ],
)
def test_a_sequence_that_is_alike_gives_what_is_computed_of_its_tail(
    first, computed, second, num_copied
):
    device = Device(16)
    like = device.insert(first)
    device.compute(like, first[:computed])
    assert device.insert(second).copy is None
    device = Device(16)
    like = device.insert(first)
    device.compute(like, first[:computed])
    sequence = device.insert(second, like)
    begin = 4 if second[:4] == A and first[:4] == A else 0
    assert device.tree.computed_tokens(sequence) == begin + num_copied
    device.carry_out(sequence)
    device.tree.release(like)
    device.compute(sequence, second)
    assert device.holds(sequence, second)


def test_what_a_node_has_in_common_counts_before_less_in_a_tail():
    device = Device(16)
    device.cache([*A, 2, 2, 2, 2])
    like = device.insert([*A, 2, 9])
    device.carry_out(like)
    device.compute(like, [*A, 2, 9])
    sequence = device.insert([*A, 2, 2, 2, 9], like)
    assert sequence.copy is not None
    assert sequence.copy.num_tokens == 3
    device.tree.release(like)
    assert device.insert([*A, 2, 9, 9], like).num_cached_tokens == 5  # it has left


def test_salts_copy_nothing_from_each_other():
    tree = PrefixTree(16, 4)
    cache(tree, A, b"mine")
    assert tree.insert([1, 1], b"yours", copy_partial=True).copy is None
    assert tree.insert([1, 1], b"mine", copy_partial=True).copy is not None


# What is not computed yet.


def test_a_pending_chunk_is_copied_from_once_it_is_computed():
    tree = PrefixTree(16, 4)
    cache(tree, A)
    pending = tree.insert(A + B)
    prompt = [*A, 2, 2, 9]
    assert tree.match(prompt).num_copyable_tokens == 0
    assert tree.insert(prompt, copy_partial=True).copy is None
    tree.mark_computed(pending, 8)
    copy = tree.insert(prompt, copy_partial=True).copy
    assert copy is not None
    assert (copy.source_chunk, copy.num_tokens) == (pending.chunk_ids[1], 2)


def test_pending_neighbours_do_not_hide_a_computed_one():
    tree = PrefixTree(64, 4)
    cache(tree, [2, 2, 1, 1])
    for last in range(10):
        tree.insert([2, 2, 5, last])
    assert tree.match([2, 2, 5, 99]).num_copyable_tokens == 2
    tree.check()


def test_one_that_shares_the_chunk_owes_all_of_it():
    device = Device(16)
    device.cache(A + B)
    prompt = [*A, 2, 2, 9, 9]
    first = device.insert(prompt)
    second = device.insert([*prompt, 7])
    assert second.copy is None
    assert second.num_cached_tokens == 8
    assert device.tree.computed_tokens(first) == 6
    assert device.tree.computed_tokens(second) == 4
    device.tree.release(first)  # and its copy is dropped
    assert device.tree.computed_tokens(second) == 4
    device.compute(second, [*prompt, 7])
    assert device.holds(second, [*prompt, 7])


def test_the_one_that_shares_the_chunk_may_be_computed_first():
    device = Device(16)
    device.cache(A + B)
    prompt = [*A, 2, 2, 9, 9]
    first, second = device.insert(prompt + C), device.insert([*prompt, 7])
    device.carry_out(first)
    device.compute(second, [*prompt, 7])
    assert device.tree.computed_tokens(first) == 8
    device.compute(first, prompt + C)
    assert device.holds(first, prompt + C)


@pytest.mark.parametrize("prompt", [[*A, 2, 2, 9, 9], [*A, 2, 2, 9]])
def test_marking_less_than_was_copied_takes_nothing_back(prompt):
    tree = PrefixTree(16, 4)
    cache(tree, A + B)
    sequence = tree.insert(prompt, copy_partial=True)
    for num_tokens, expected in [
        (0, 6),
        (5, 6),
        (6, 6),
        (len(prompt), len(prompt)),
        (6, len(prompt)),
    ]:
        tree.mark_computed(sequence, num_tokens)
        assert tree.computed_tokens(sequence) == expected
        tree.check()


def test_a_copied_tail_that_fills_joins_its_twin():
    device = Device(16)
    chunk_ids = device.cache(A + B)
    sequence = device.insert([*A, 2, 2])
    device.carry_out(sequence)
    device.tree.append(sequence, [2, 2])
    assert sequence.chunk_ids == chunk_ids
    assert sizes(device.tree) == (14, 0, 2)


# Donors that go.


def test_a_donor_evicted_by_the_insert_may_become_the_destination():
    device = Device(2)
    chunk_ids = device.cache(A + B)
    prompt = [*A, 2, 2, 9]
    sequence = device.insert(prompt)
    assert sequence.copy == PartialCopy(chunk_ids[1], chunk_ids[1], 2)
    device.carry_out(sequence)
    device.compute(sequence, prompt)
    assert device.holds(sequence, prompt)


def test_a_donor_evicted_by_the_insert_may_become_another_chunk_of_the_sequence():
    device = Device(4)
    donor, other = device.cache(A)[0], device.cache(B)[0]
    sequence = device.insert([1, 1, 9, 9, *C, *D, 7])
    copy = sequence.copy
    assert copy is not None
    assert (copy.source_chunk, copy.destination_chunk) == (donor, other)
    assert donor in sequence.chunk_ids
    device.carry_out(sequence)
    device.compute(sequence, [1, 1, 9, 9, *C, *D, 7])
    assert device.holds(sequence, [1, 1, 9, 9, *C, *D, 7])


def test_copies_of_several_inserts_are_carried_out_together():
    """The second prompt evicts the first one's donor and copies into that very chunk."""
    device = Device(3)
    first_donor, second_donor = device.cache(A)[0], device.cache(B)[0]
    prompts = [[1, 1, 9], [2, 2, 9]]
    first, second = (device.insert(prompt) for prompt in prompts)
    assert first.copy is not None
    assert first.copy.source_chunk == first_donor
    assert second.copy == PartialCopy(second_donor, first_donor, 2)
    device.carry_out(first, second)
    for sequence, prompt in zip((first, second), prompts, strict=True):
        device.compute(sequence, prompt)
    assert device.holds(first, prompts[0])
    assert device.holds(second, prompts[1])


def test_a_donor_may_leave_before_the_copy_where_nothing_is_retained():
    device = Device(4, retain=False)
    donor = device.tree.insert(A)
    device.compute(donor, A)
    copying = device.insert([1, 1, 9, 9])
    device.tree.release(donor)
    other = device.insert([5, 5])
    assert other.chunk_ids == donor.chunk_ids  # handed out again
    device.carry_out(copying)
    device.compute(other, [5, 5])
    device.compute(copying, [1, 1, 9, 9])
    assert device.holds(copying, [1, 1, 9, 9])


def test_the_destination_of_a_released_sequence_is_another_ones_at_once():
    device = Device(3)
    device.cache(A)
    device.cache(B)
    dropped = device.insert([1, 1, 9])
    assert dropped.copy is not None
    device.tree.release(dropped)
    sequence = device.insert([2, 2, 9])
    assert sequence.copy is not None
    assert sequence.copy.destination_chunk == dropped.copy.destination_chunk
    device.carry_out(sequence)
    assert device.holds(sequence, [2, 2])


def test_after_a_reset_old_chunks_give_nothing_and_old_copies_stand():
    device = Device(16)
    active = device.insert(A + B)
    device.compute(active, A + B)
    waiting = device.insert([*A, 2, 2, 9])
    device.tree.reset()
    assert device.tree.match([*A, 2, 2, 9]).num_copyable_tokens == 0
    assert device.insert([*A, 2, 2, 9]).copy is None
    assert device.insert([1, 1]).copy is None
    device.carry_out(waiting)
    device.compute(waiting, [*A, 2, 2, 9])
    assert device.holds(waiting, [*A, 2, 2, 9])
    device.tree.release(active)
    device.tree.release(waiting)
    device.tree.check()


# Forks.


def test_a_fork_copies_the_tail_after_it_was_copied_into():
    device = Device(16)
    device.cache(A + B)
    parent = device.insert([*A, 2, 2])
    device.carry_out(parent)
    child, copies = device.tree.fork(parent)
    device.tree.check()
    assert child.copy is None
    assert device.tree.computed_tokens(child) == child.num_cached_tokens == 6
    device.pool.copy([PartialCopy(*pair, 4) for pair in copies])
    device.tree.release(parent)
    assert device.holds(child, [*A, 2, 2])


def test_a_fork_owes_all_of_a_pending_chunk_that_its_parent_copied_into():
    device = Device(16)
    device.cache(A + B)
    prompt = [*A, 2, 2, 9, 9]
    parent = device.insert(prompt)
    device.carry_out(parent)
    child, copies = device.tree.fork(parent)
    assert copies == []
    assert (child.copy, device.tree.computed_tokens(child)) == (None, 4)
    device.tree.release(parent)
    device.compute(child, prompt)
    assert device.holds(child, prompt)
