"""What must always hold in a prefix tree."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jax_chunkattn.tree.children import children_of
from jax_chunkattn.tree.nodes import TOKEN_BYTES, Node, Root, SequenceHandle, encode_path

if TYPE_CHECKING:
    from jax_chunkattn.tree.prefix_tree import PrefixTree


def check_tree(tree: PrefixTree) -> None:
    """Verifies every invariant of ``tree`` from scratch.

    Raises AssertionError naming the first one broken. Costs O(num_chunks + chunks of all rows).
    """
    tree._allocator.check()
    _check_nodes(tree)
    _check_roots(tree)
    _check_children(tree)
    for sequence in tree._sequences:
        _check_sequence(tree, sequence)
    _check_references(tree)
    _check_cached(tree)
    _check_chunks(tree)
    check_rows(tree.rows(), set(tree._sequences))
    for sequence in tree._sequences:
        table = sequence.chunk_table.tolist()
        _require(table == sequence.chunk_ids, "a chunk table is not the chunk ids")


def check_rows(rows: list[SequenceHandle], active: set[SequenceHandle]) -> None:
    """Raises AssertionError unless ``rows`` are ``active``, each node's in one contiguous range."""
    _require(len(rows) == len(active) and set(rows) == active, "rows are not the active sequences")
    finished: set[int] = set()
    previous: set[int] = set()
    for sequence in rows:
        current = {node.chunk_id for node in sequence.nodes}
        finished |= previous - current
        _require(not finished & current, "rows under a node are not one contiguous range")
        previous = current


def _require(condition: bool, broken: str) -> None:
    if not condition:
        raise AssertionError(f"prefix tree: {broken}")


def _check_nodes(tree: PrefixTree) -> None:
    for key, node in tree._nodes.items():
        parent = node.parent
        _require(key == node.key, f"node {node.chunk_id} is filed under another key")
        _require(len(key) == 8 + tree._chunk_bytes, f"node {node.chunk_id} is not one chunk long")
        _require(parent is not None, f"node {node.chunk_id} has no parent")
        assert parent is not None
        _require(
            int.from_bytes(key[:8], "little") == parent.chunk_id,
            f"the key of node {node.chunk_id} does not name its parent",
        )
        if isinstance(parent, Node):
            _require(
                tree._nodes.get(parent.key) is parent,
                f"the parent of node {node.chunk_id} is not in the tree",
            )
            _require(
                parent.computed or not node.computed,
                f"node {node.chunk_id} is computed and its parent is not",
            )


def _check_roots(tree: PrefixTree) -> None:
    expected: Counter[Root] = Counter(sequence.root for sequence in tree._sequences)
    expected.update(node.parent for node in tree._nodes.values() if isinstance(node.parent, Root))
    for root, references in expected.items():
        _require(root.references == references, f"root {root.salt!r} counts references wrongly")
        _require(
            root.retired != (tree._roots.get(root.salt) is root),
            f"root {root.salt!r} is retired and matchable, or neither",
        )
    _require(
        all(root in expected for root in tree._roots.values()), "a root with nothing below it stays"
    )
    _require(len({root.chunk_id for root in expected}) == len(expected), "two roots share an id")


def _check_children(tree: PrefixTree) -> None:
    expected: dict[Node | Root, set[Node]] = {sequence.root: set() for sequence in tree._sequences}
    expected.update((node, set()) for node in tree._nodes.values())
    for node in tree._nodes.values():
        assert node.parent is not None
        children = expected.setdefault(node.parent, set())
        if node.computed:
            children.add(node)
    for parent, children in expected.items():
        listed = children_of(parent)
        place = f"below {parent.chunk_id}"
        _require(set(listed) == children, f"not the computed children are listed {place}")
        keys = [child.key for child in listed]
        _require(keys == sorted(set(keys)), f"the children {place} are not in order, each once")
        _require(
            isinstance(parent.computed_children, list) == (len(listed) > 1),
            f"one child {place} is a list, or several are none",
        )


def _check_sequence(tree: PrefixTree, sequence: SequenceHandle) -> None:
    size = tree.chunk_size
    parent: Node | Root = sequence.root
    for node in sequence.nodes:
        _require(tree._nodes.get(node.key) is node, "a sequence uses a node not in the tree")
        _require(node.parent is parent, "the path of a sequence is not a path of the tree")
        parent = node
    sealed_ids = [node.chunk_id for node in sequence.nodes]
    _require(sequence.chunk_ids[: len(sealed_ids)] == sealed_ids, "chunk ids are not the path's")
    _require(sequence.path == encode_path(sealed_ids), "the sort key is not the path")
    _require(len(sequence.tail) % TOKEN_BYTES == 0, "a tail holds a part of a token")
    _require(
        sequence.num_tokens == len(sealed_ids) * size + sequence.num_tail_tokens,
        "the tokens of a sequence do not add up",
    )
    _require(sequence.num_tokens <= len(sequence.chunk_ids) * size, "a sequence outgrew its chunks")
    _require(
        0 <= sequence.num_computed_tail_tokens <= sequence.num_tail_tokens,
        "more of a tail is computed than there is",
    )
    if sequence.copy is not None:
        _require(0 < sequence.copy.num_tokens < size, "a copy is not a part of a chunk")
        _require(
            tree.computed_tokens(sequence) >= sequence.num_cached_tokens,
            "what a sequence was to copy does not count as computed",
        )


def _check_references(tree: PrefixTree) -> None:
    expected = Counter(id(node) for sequence in tree._sequences for node in sequence.nodes)
    for node in tree._nodes.values():
        _require(
            node.references == expected[id(node)],
            f"node {node.chunk_id} counts {node.references} references, "
            f"{expected[id(node)]} sequences use it",
        )


def _check_cached(tree: PrefixTree) -> None:
    listed = list(tree._cached)
    cached = {id(node) for node in tree._nodes.values() if node.references == 0}
    _require(len(listed) == len(tree._cached), "the cached count is wrong")
    _require(
        len(listed) == len(cached) and {id(node) for node in listed} == cached,
        "the eviction order does not list exactly the unused nodes",
    )
    _require(all(node.computed for node in listed), "a pending node is cached")
    _require(tree.retain or not listed, "a node is cached though nothing is to be retained")
    gone: set[int] = set()
    for node in listed:
        _require(id(node.parent) not in gone, "a node would be evicted before one below it")
        gone.add(id(node))


def _check_chunks(tree: PrefixTree) -> None:
    places = Counter(node.chunk_id for node in tree._nodes.values())
    for sequence in tree._sequences:
        places.update(sequence.private_chunk_ids)
    twice = [chunk_id for chunk_id, count in places.items() if count > 1]
    _require(not twice, f"chunks {twice} are in two places")
    _require(
        all(tree._allocator.is_allocated(chunk_id) for chunk_id in places),
        "a chunk is used and free",
    )
    _require(tree.free_count + len(places) == tree.num_chunks, "a chunk is neither used nor free")
    in_use = {chunk_id for sequence in tree._sequences for chunk_id in sequence.chunk_ids}
    _require(tree.in_use_count == len(in_use), "the in-use count is wrong")
    _require(
        tree.free_count + tree.cached_count + tree.in_use_count == tree.num_chunks,
        "free, cached and in-use chunks do not add up to the pool",
    )
