"""Short prompts and short ways to bring a prefix tree into a state. Chunks hold 4 tokens."""

from __future__ import annotations

from jax_chunkattn.prefix_tree import PrefixTree
from jax_chunkattn.tree_nodes import SequenceHandle

A, B, C, D = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]


def insert_computed(tree: PrefixTree, tokens, salt: bytes = b"") -> SequenceHandle:
    sequence = tree.insert(tokens, salt)
    tree.mark_computed(sequence, sequence.num_tokens)
    tree.check()
    return sequence


def cache(tree: PrefixTree, tokens, salt: bytes = b"") -> list[int]:
    """Leaves ``tokens`` cached; returns their sealed chunks."""
    sequence = insert_computed(tree, tokens, salt)
    chunk_ids = [node.chunk_id for node in sequence.nodes]
    tree.release(sequence)
    tree.check()
    return chunk_ids


def sizes(tree: PrefixTree) -> tuple[int, int, int]:
    tree.check()
    return tree.free_count, tree.cached_count, tree.in_use_count


def state(tree: PrefixTree):
    """All that a refused operation must leave as it was."""
    tree.check()
    eviction_order = [node.chunk_id for node in tree._cached]
    rows = [(tuple(row.chunk_ids), row.num_tokens, row.tail) for row in tree.rows()]
    return sizes(tree), eviction_order, rows, tree.version, sorted(tree._roots), tree.num_nodes
