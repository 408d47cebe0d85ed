"""The order in which cached chunks are evicted."""

from __future__ import annotations

from collections.abc import Iterator

from jax_chunkattn.tree.nodes import Node


class RecencyList:
    """Cached nodes from the least to the most recently used: a linked list through the nodes.

    A sequence that leaves adds the nodes it was the last to use deepest first, and a node cannot
    become unused before those below it. So a node always stands behind all its descendants, the
    first node of the list is always a leaf, and eviction by age, leaves first, is to take from the
    front: O(1), with no heap and nothing stale to skip.
    """

    def __init__(self):
        self._count = 0
        self._end = Node(-1, b"", None)  # sentinel: its next is the oldest, its previous the newest
        self._end.previous = self._end.next = self._end

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Node]:
        """Nodes, the least recently used first."""
        node = self._end.next
        while node is not None and node is not self._end:
            yield node
            node = node.next

    @property
    def oldest(self) -> Node:
        """The next node to evict; raises IndexError when there is none."""
        if self._count == 0 or self._end.next is None:
            raise IndexError("no cached node")
        return self._end.next

    def push(self, node: Node) -> None:
        """Makes ``node`` the most recently used."""
        end, newest = self._end, self._end.previous
        assert newest is not None
        assert node.next is None
        node.previous, node.next = newest, end
        newest.next = end.previous = node
        self._count += 1

    def remove(self, node: Node) -> None:
        """Takes ``node`` out, wherever it stands."""
        previous, following = node.previous, node.next
        assert previous is not None
        assert following is not None
        previous.next, following.previous = following, previous
        node.previous = node.next = None
        self._count -= 1
