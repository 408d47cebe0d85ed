"""Which computed child of a node begins most like some tokens.

The tree's own table finds a child by all of its tokens; this finds the one that has the longest
beginning in common. Sorted by their tokens' bytes, children with a common beginning stand together,
so the best is a neighbour of the place where the tokens would be inserted.

Only computed children are listed: a pending one has nothing to copy. Most nodes have one child at
most, which is stored without a list.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

from jax_chunkattn.tree.nodes import TOKEN_BYTES, Node, Root

_BY_KEY = attrgetter("key")  # siblings' keys begin alike, with their parent's id; then come tokens


def children_of(parent: Node | Root) -> list[Node]:
    """The listed children of ``parent``, in the order of their tokens' bytes."""
    children = parent.computed_children
    if isinstance(children, Node):
        return [children]
    return list(children or ())


def set_computed(node: Node) -> None:
    """Makes a pending node computed, which lists it under its parent.

    O(log children) comparisons; the pointers to the siblings behind it move, 8 bytes each.
    """
    node.computed = True
    parent = node.parent
    assert parent is not None
    children = parent.computed_children
    if children is None:
        parent.computed_children = node
    elif isinstance(children, Node):
        parent.computed_children = sorted((children, node), key=_BY_KEY)
    else:
        children.insert(bisect_left(children, node.key, key=_BY_KEY), node)


def remove_child(node: Node) -> None:
    """Takes ``node``, which is computed, off its parent's list; costs what `set_computed` does."""
    parent = node.parent
    assert parent is not None
    children = parent.computed_children
    if children is node:
        parent.computed_children = None
        return
    assert isinstance(children, list)
    del children[bisect_left(children, node.key, key=_BY_KEY)]
    if len(children) == 1:
        parent.computed_children = children[0]


def closest_child(parent: Node | Root, tokens: bytes) -> tuple[Node | None, int]:
    """The listed child that shares the longest beginning with ``tokens``, and its length in tokens.

    O(log children). ``(None, 0)`` if no child has the same first token.
    """
    children = parent.computed_children
    if children is None or not tokens:
        return None, 0
    if isinstance(children, Node):
        neighbours = [children]
    else:
        key = parent.chunk_id.to_bytes(8, "little") + tokens
        position = bisect_left(children, key, key=_BY_KEY)
        neighbours = children[max(position - 1, 0) : position + 1]
    closest, most = None, 0
    for child in neighbours:
        shared = num_shared_tokens(child.key[8:], tokens)
        if shared > most:
            closest, most = child, shared
    return closest, most


def num_shared_tokens(first: bytes, second: bytes) -> int:
    """How many tokens two sequences of them begin with alike."""
    length = min(len(first), len(second))
    differing = int.from_bytes(first[:length], "little") ^ int.from_bytes(second[:length], "little")
    if not differing:
        return length // TOKEN_BYTES
    lowest_bit = (differing & -differing).bit_length() - 1  # in the first byte that differs
    return lowest_bit // (8 * TOKEN_BYTES)
