"""What must always hold in a prefix tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from jax_chunkattn.tree.children import children_of
from jax_chunkattn.tree.nodes import (
    TOKEN_BYTES,
    Node,
    Root,
    SequenceHandle,
    computed_tokens,
    encode_path,
)
from jax_chunkattn.tree.stored_chunks import StoredChunks


def check_tree(
    stored: StoredChunks, sequences: Set[SequenceHandle], rows: list[SequenceHandle]
) -> None:
    """Verifies every invariant of a tree from scratch, given its sequences in both orders.

    Raises AssertionError naming the first one broken. Costs O(num_chunks + chunks of all rows).
    """
    stored.allocator.check()
    _check_nodes(stored)
    _check_roots(stored, sequences)
    _check_children(stored, sequences)
    for sequence in sequences:
        _check_sequence(stored, sequence)
    _check_references(stored, sequences)
    _check_cached(stored)
    _check_chunks(stored, sequences)
    stored.windows.check(sequences)
    check_rows(rows, sequences)
    for sequence in sequences:
        table = sequence.chunk_table.tolist()
        _require(table == sequence.chunk_ids, "a chunk table is not the chunk ids")


def check_rows(rows: list[SequenceHandle], active: Set[SequenceHandle]) -> None:
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


def _check_nodes(stored: StoredChunks) -> None:
    for key, node in stored.nodes.items():
        parent = node.parent
        _require(key == node.key, f"node {node.chunk_id} is filed under another key")
        _require(len(key) == 8 + stored.chunk_bytes, f"node {node.chunk_id} is not one chunk long")
        _require(parent is not None, f"node {node.chunk_id} has no parent")
        assert parent is not None
        _require(
            int.from_bytes(key[:8], "little") == parent.chunk_id,
            f"the key of node {node.chunk_id} does not name its parent",
        )
        if isinstance(parent, Node):
            _require(
                stored.nodes.get(parent.key) is parent,
                f"the parent of node {node.chunk_id} is not in the tree",
            )
            _require(
                parent.computed or not node.computed,
                f"node {node.chunk_id} is computed and its parent is not",
            )


def _check_roots(stored: StoredChunks, sequences: Set[SequenceHandle]) -> None:
    expected: Counter[Root] = Counter(sequence.root for sequence in sequences)
    expected.update(node.parent for node in stored.nodes.values() if isinstance(node.parent, Root))
    for root, references in expected.items():
        _require(root.references == references, f"root {root.salt!r} counts references wrongly")
        _require(
            root.retired != (stored.roots.get(root.salt) is root),
            f"root {root.salt!r} is retired and matchable, or neither",
        )
    _require(
        all(root in expected for root in stored.roots.values()),
        "a root with nothing below it stays",
    )
    _require(len({root.chunk_id for root in expected}) == len(expected), "two roots share an id")


def _check_children(stored: StoredChunks, sequences: Set[SequenceHandle]) -> None:
    expected: dict[Node | Root, set[Node]] = {sequence.root: set() for sequence in sequences}
    expected.update((node, set()) for node in stored.nodes.values())
    for node in stored.nodes.values():
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


def _check_sequence(stored: StoredChunks, sequence: SequenceHandle) -> None:
    size = stored.chunk_size
    parent: Node | Root = sequence.root
    for node in sequence.nodes:
        _require(stored.nodes.get(node.key) is node, "a sequence uses a node not in the tree")
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
            computed_tokens(sequence, size) >= sequence.num_cached_tokens,
            "what a sequence was to copy does not count as computed",
        )


def _check_references(stored: StoredChunks, sequences: Set[SequenceHandle]) -> None:
    expected = Counter(id(node) for sequence in sequences for node in sequence.nodes)
    for node in stored.nodes.values():
        _require(
            node.references == expected[id(node)],
            f"node {node.chunk_id} counts {node.references} references, "
            f"{expected[id(node)]} sequences use it",
        )


def _check_cached(stored: StoredChunks) -> None:
    listed = list(stored.cached)
    cached = {id(node) for node in stored.nodes.values() if node.references == 0}
    _require(len(listed) == len(stored.cached), "the cached count is wrong")
    _require(
        len(listed) == len(cached) and {id(node) for node in listed} == cached,
        "the eviction order does not list exactly the unused nodes",
    )
    _require(all(node.computed for node in listed), "a pending node is cached")
    _require(stored.retain or not listed, "a node is cached though nothing is to be retained")
    gone: set[int] = set()
    for node in listed:
        _require(id(node.parent) not in gone, "a node would be evicted before one below it")
        gone.add(id(node))


def _check_chunks(stored: StoredChunks, sequences: Set[SequenceHandle]) -> None:
    places = Counter(node.chunk_id for node in stored.nodes.values())
    for sequence in sequences:
        places.update(sequence.private_chunk_ids)
    twice = [chunk_id for chunk_id, count in places.items() if count > 1]
    _require(not twice, f"chunks {twice} are in two places")
    _require(
        all(stored.allocator.is_allocated(chunk_id) for chunk_id in places),
        "a chunk is used and free",
    )
    _require(
        stored.free_count + len(places) == stored.num_chunks, "a chunk is neither used nor free"
    )
    in_use = {chunk_id for sequence in sequences for chunk_id in sequence.chunk_ids}
    _require(
        stored.free_count + len(stored.cached) + len(in_use) == stored.num_chunks,
        "free, cached and in-use chunks do not add up to the pool",
    )
