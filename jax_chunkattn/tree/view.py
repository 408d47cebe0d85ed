"""What a prefix tree holds, to be looked at: runs of chunks, who uses them, and what is cached.

No tokens and no salts are in it, so that it may be shown to who must not read prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax_chunkattn.tree.nodes import Node, Root
from jax_chunkattn.tree.prefix_tree import PrefixTree

MOST_VIEWED = 2048


@dataclass(frozen=True)
class ViewedRun:
    """Sealed chunks, each behind the one before and used by the same sequences.

    Attributes:
      chunk_ids: in the order of their tokens.
      parent: which run of the view they follow; None at the beginning of a prompt.
      namespace: a number for the salt, the same for all runs below one root.
      users: sequences that go through them; 0 where they are cached and nobody uses them.
      computed: their keys and values are there; else a sequence is to compute them.
    """

    chunk_ids: tuple[int, ...]
    parent: int | None
    namespace: int
    users: int
    computed: bool


@dataclass(frozen=True)
class TreeView:
    """A prefix tree at one moment.

    Attributes:
      runs: those that most sequences use come first below each run; parents before their children.
      chunk_size: tokens of a chunk, C.
      num_chunks: of the pool, N.
      free, in_use, cached: chunks of each kind; they add up to the pool.
      hidden: sealed chunks that are in none of the runs, because there were too many of them.
      evicted: chunks evicted since the tree was made.
    """

    runs: tuple[ViewedRun, ...]
    chunk_size: int
    num_chunks: int
    free: int
    in_use: int
    cached: int
    hidden: int
    evicted: int


def view_tree(tree: PrefixTree, most: int = MOST_VIEWED) -> TreeView:
    """The tree as it is, in at most `most` runs; the others, the least used, are only counted.

    Takes time in the number of sealed chunks: about a microsecond for each. Raises ValueError when
    `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    roots, below = _children(tree.nodes())
    runs: list[ViewedRun] = []
    shown = 0
    tops = [node for root in roots for node in below.get(root, ())]
    stack: list[tuple[Node, int | None]] = [(node, None) for node in _most_used_last(tops)]
    while stack and len(runs) < most:
        node, parent = stack.pop()
        run, children = [node], below.get(node.chunk_id, [])
        while len(children) == 1 and _alike(node, children[0]):
            node = children[0]
            run.append(node)
            children = below.get(node.chunk_id, [])
        namespace = runs[parent].namespace if parent is not None else _root_of(node, roots)
        chunk_ids = tuple(one.chunk_id for one in run)
        runs.append(ViewedRun(chunk_ids, parent, namespace, node.references, node.computed))
        shown += len(run)
        stack.extend((child, len(runs) - 1) for child in _most_used_last(children))
    return TreeView(
        runs=tuple(runs),
        chunk_size=tree.chunk_size,
        num_chunks=tree.num_chunks,
        free=tree.free_count,
        in_use=tree.in_use_count,
        cached=tree.cached_count,
        hidden=tree.num_nodes - shown,
        evicted=tree.num_evicted,
    )


def _children(nodes: list[Node]) -> tuple[dict[int, int], dict[int, list[Node]]]:
    """A number for each root, and what is below each root and chunk, by its id."""
    roots: dict[int, int] = {}
    below: dict[int, list[Node]] = {}
    for node in nodes:
        parent = node.parent
        assert parent is not None, "a node of the tree has a parent"
        if isinstance(parent, Root):
            roots.setdefault(parent.chunk_id, len(roots))
        below.setdefault(parent.chunk_id, []).append(node)
    return roots, below


def _root_of(node: Node, roots: dict[int, int]) -> int:
    above: Node | Root | None = node
    while isinstance(above, Node):
        above = above.parent
    assert above is not None
    return roots[above.chunk_id]


def _alike(node: Node, child: Node) -> bool:
    return node.references == child.references and node.computed == child.computed


def _most_used_last(nodes: list[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: (node.references, -node.chunk_id))
