"""Short prompts, short ways to bring a prefix tree into a state, and a pool made of lists.

Chunks hold 4 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jax_chunkattn.tree.nodes import PartialCopy, SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree

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
    eviction_order = [node.chunk_id for node in tree._stored.cached]
    rows = [(tuple(row.chunk_ids), row.num_tokens, row.tail) for row in tree.rows()]
    return (
        sizes(tree),
        eviction_order,
        rows,
        tree.version,
        sorted(tree._stored.roots),
        tree.num_nodes,
    )


class SlotPool:
    """What was last written to each token slot of a pool."""

    def __init__(self, num_chunks: int, chunk_size: int):
        self._size = chunk_size
        self._slots: list[list[Any]] = [[None] * chunk_size for _ in range(num_chunks)]

    def write(self, chunk_ids: Sequence[int], begin: int, contents: Iterable[Any]) -> None:
        for position, content in enumerate(contents, begin):
            self._slots[chunk_ids[position // self._size]][position % self._size] = content

    def read(self, chunk_ids: Sequence[int], num_tokens: int) -> list[Any]:
        places = [divmod(position, self._size) for position in range(num_tokens)]
        return [self._slots[chunk_ids[index]][slot] for index, slot in places]

    def copy(self, copies: Sequence[PartialCopy], *, whole_chunks: bool = False) -> None:
        """Reads all sources, then writes all destinations, the last one first."""
        lengths = [self._size if whole_chunks else copy.num_tokens for copy in copies]
        contents = [
            self._slots[copy.source_chunk][:length]
            for copy, length in zip(copies, lengths, strict=True)
        ]
        for copy, content in reversed(list(zip(copies, contents, strict=True))):
            self._slots[copy.destination_chunk][: len(content)] = content
