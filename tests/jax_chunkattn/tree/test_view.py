"""A view of the tree has each sealed chunk in one run, with those who use it."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn import PrefixTree
from jax_chunkattn.tree.view import TreeView, view_tree


def tree_of(*prompts: tuple[list[int], bytes], chunks: int = 64) -> tuple[PrefixTree, list]:
    """Chunks of two tokens; all that is full is computed."""
    tree = PrefixTree(chunks, 2)
    sequences = []
    for tokens, salt in prompts:
        sequence = tree.insert(tokens, salt)
        tree.mark_computed(sequence, len(tokens))
        sequences.append(sequence)
    return tree, sequences


def shape(view: TreeView) -> list[tuple[int, int | None, int, int]]:
    return [(len(run.chunk_ids), run.parent, run.users, run.namespace) for run in view.runs]


def test_runs_end_where_users_part():
    common = [1, 2, 3, 4]
    tree, sequences = tree_of(
        ([*common, 5, 6, 7, 8], b""), ([*common, 9, 9], b""), ([*common, 9, 9, 1], b""),
        (common, b"other"),
    )  # fmt: skip
    view = view_tree(tree)
    assert sorted(shape(view), key=str) == sorted(
        [(2, None, 3, 0), (1, 0, 2, 0), (2, 0, 1, 0), (2, None, 1, 1)], key=str
    )
    assert view.runs[0].users == 3
    assert all(run.computed for run in view.runs)
    assert (view.in_use, view.cached, view.free) == (8, 0, 56)
    tree.release(sequences[0])
    view = view_tree(tree)
    assert (2, 0, 0, 0) in shape(view)
    assert (view.in_use, view.cached, view.hidden) == (6, 2, 0)


def test_what_is_pending_says_so():
    tree = PrefixTree(8, 2)
    sequence = tree.insert([1, 2, 3, 4])
    tree.mark_computed(sequence, 2)
    assert [(run.computed, run.parent) for run in view_tree(tree).runs] == [
        (True, None),
        (False, 0),
    ]


def test_it_is_of_all_chunks_whatever_the_tree():
    random = np.random.default_rng(0)
    tree, sequences = tree_of(
        *((random.integers(0, 2, random.integers(1, 24)).tolist(), b"%d" % (at % 3))
          for at in range(80)), chunks=1000,
    )  # fmt: skip
    for sequence in sequences[::2]:
        tree.release(sequence)
    view = view_tree(tree)
    seen = [chunk for run in view.runs for chunk in run.chunk_ids]
    assert sorted(seen) == sorted(node.chunk_id for node in tree.nodes())
    users = {node.chunk_id: node.references for node in tree.nodes()}
    assert all(users[chunk] == run.users for run in view.runs for chunk in run.chunk_ids)
    for index, run in enumerate(view.runs):
        if run.parent is not None:
            assert run.parent < index
            assert view.runs[run.parent].namespace == run.namespace
            assert view.runs[run.parent].users >= run.users
    few = view_tree(tree, 5)
    assert len(few.runs) == 5
    assert few.hidden == len(seen) - sum(len(run.chunk_ids) for run in few.runs) > 0
    assert all(run.users >= 1 for run in few.runs)


def test_what_was_forgotten_is_no_longer_below_a_root_of_its_salt():
    tree, sequences = tree_of(([1, 2], b"a"))
    tree.reset()
    tree.insert([1, 2], b"a")
    view = view_tree(tree)
    assert sorted(run.namespace for run in view.runs) == [0, 1]
    tree.release(sequences[0])
    assert len(view_tree(tree).runs) == 1


def test_an_empty_tree_has_no_runs():
    view = view_tree(PrefixTree(4, 2))
    assert (view.runs, view.free, view.hidden, view.evicted) == ((), 4, 0, 0)
    with pytest.raises(ValueError, match="most must be at least 1"):
        view_tree(PrefixTree(4, 2), 0)
