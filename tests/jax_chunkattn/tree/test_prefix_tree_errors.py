"""PrefixTree: what is refused, and that check() finds what is broken."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from jax_chunkattn.tree import prefix_tree
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.children import children_of, remove_child
from jax_chunkattn.tree.nodes import SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.tree.tree_helpers import A, B, C, D, cache, insert_computed, state

# Refusals.


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        (np.array([]), "empty"),
        ([1, -1], "negative"),
        (np.array([3, -7]), "negative"),
        ([1.5], "integers"),
        (["a"], "integers"),
        ([2**31], "int32"),
        (np.array([2**31]), "int32"),
        (np.array([1.0]), "integer"),
        (np.array([[1, 2]]), "1-d"),
    ],
)
def test_bad_tokens_are_refused_before_anything_changes(tokens, message: str):
    tree = PrefixTree(8, 4)
    insert_computed(tree, [*A, 2])
    before = state(tree)
    for use in (tree.insert, tree.match):
        with pytest.raises(ValueError, match=message):
            use(tokens)
    assert state(tree) == before


@pytest.mark.parametrize(("num_chunks", "chunk_size"), [(0, 4), (-1, 4), (4, 0), (4, -64)])
def test_impossible_sizes_are_refused(num_chunks: int, chunk_size: int):
    with pytest.raises(ValueError, match=r"num_chunks|chunk_size"):
        PrefixTree(num_chunks, chunk_size)


def test_the_tree_needs_no_jax():
    imported = set()
    for path in Path(prefix_tree.__file__).parent.glob("*.py"):
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.Import):
                imported |= {alias.name for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                imported.add(statement.module)
    assert "numpy" in imported
    assert not any(name.split(".")[0] in ("jax", "flax", "pallas_kernels") for name in imported)


# check() itself.


def _break_references(tree: PrefixTree, sequence: SequenceHandle) -> None:
    sequence.nodes[0].references += 1


def _break_count(tree: PrefixTree, sequence: SequenceHandle) -> None:
    tree._stored.allocator.allocate(1)


def _break_chunk_ids(tree: PrefixTree, sequence: SequenceHandle) -> None:
    sequence.chunk_ids[0] = sequence.chunk_ids[1]


def _break_two_places(tree: PrefixTree, sequence: SequenceHandle) -> None:
    sequence.chunk_ids[-1] = sequence.chunk_ids[0]


def _break_tree_key(tree: PrefixTree, sequence: SequenceHandle) -> None:
    tree._stored.nodes[b"elsewhere"] = tree._stored.nodes.pop(sequence.nodes[1].key)


def _break_eviction_list(tree: PrefixTree, sequence: SequenceHandle) -> None:
    tree._stored.cached.remove(tree._stored.cached.oldest)


def _break_eviction_order(tree: PrefixTree, sequence: SequenceHandle) -> None:
    leaf = tree._stored.cached.oldest
    tree._stored.cached.remove(leaf)
    tree._stored.cached.push(leaf)


def _break_computed(tree: PrefixTree, sequence: SequenceHandle) -> None:
    sequence.nodes[0].computed = False


def _break_rows(tree: PrefixTree, sequence: SequenceHandle) -> None:
    rows = tree.rows()
    tree._rows = [rows[0], rows[2], rows[1]]


def _break_children(tree: PrefixTree, sequence: SequenceHandle) -> None:
    remove_child(sequence.nodes[1])


def _break_children_of_a_root(tree: PrefixTree, sequence: SequenceHandle) -> None:
    pending = tree.insert(B)
    sequence.root.computed_children = [*children_of(sequence.root), pending.nodes[0]]


def _break_order_of_children(tree: PrefixTree, sequence: SequenceHandle) -> None:
    sequence.root.computed_children = children_of(sequence.root)[::-1]


def _break_single_child(tree: PrefixTree, sequence: SequenceHandle) -> None:
    parent = tree._stored.cached.oldest.parent
    assert parent is not None
    parent.computed_children = children_of(parent)


def _break_copy(tree: PrefixTree, sequence: SequenceHandle) -> None:
    copying = tree.insert([1, 1, 9], copy_partial=True)
    copying.num_computed_tail_tokens = 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_break_references, "references"),
        (_break_count, "neither used nor free"),
        (_break_chunk_ids, "not the path's"),
        (_break_two_places, "two places"),
        (_break_tree_key, "another key"),
        (_break_eviction_list, "eviction order"),
        (_break_eviction_order, "before one below"),
        (_break_computed, "its parent is not"),
        (_break_rows, "contiguous"),
        (_break_children, "not the computed children are listed"),
        (_break_children_of_a_root, "not the computed children are listed"),
        (_break_order_of_children, "not in order"),
        (_break_single_child, "one child"),
        (_break_copy, "was to copy does not count"),
    ],
)
def test_check_names_what_broke(break_it, message: str):
    tree = PrefixTree(32, 4)
    cache(tree, D + D)
    sequence = insert_computed(tree, A + B + [7])
    insert_computed(tree, C)
    insert_computed(tree, A + C)
    break_it(tree, sequence)
    with pytest.raises(AssertionError, match=message):
        tree.check()


# Room.


def test_room_after_insert_is_what_an_insert_leaves():
    """Matched chunks that were evictable are so no longer; what would be refused is negative."""
    tree = PrefixTree(6, 4)
    cache(tree, [*A, *B, *C])
    held = insert_computed(tree, [*A, *D])
    for tokens in ([*A, *B, 1], [*A, *D, 1], [*D, *D], [*B, *C, 1], A * 4, A * 6, A * 7):
        before = state(tree)
        room = tree.room_after_insert(tokens)
        assert state(tree) == before
        if room < 0:
            with pytest.raises(PoolExhausted):
                tree.insert(tokens)
        else:
            sequence = tree.insert(tokens)
            assert tree.free_count + tree.cached_count == room
            tree.release(sequence)
        tree.check()
    tree.release(held)
    with pytest.raises(ValueError, match="empty"):
        tree.room_after_insert([])


def test_an_allocation_that_fails_unforeseen_changes_nothing_that_is_in_use(monkeypatch):
    """It cannot happen; if it does, what the operation had taken is given back."""
    tree = PrefixTree(8, 4)
    cache(tree, [*A, *B])
    running = insert_computed(tree, [*A, *C, 1])

    def fails(count):
        raise PoolExhausted("unforeseen")

    before = state(tree)
    monkeypatch.setattr(tree._stored.allocator, "allocate", fails)
    for operation in (
        lambda: tree.insert([*A, *B, *D]),
        lambda: tree.insert([*D, *D], b"a salt of its own"),
        lambda: tree.reserve(running, 8),
        lambda: tree.fork(running),
    ):
        with pytest.raises(PoolExhausted, match="unforeseen"):
            operation()
        tree.check()
    assert state(tree) == before
