"""Which nodes of a tree search are expanded next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from jax_chunkattn.engine.search_tree import NOBODY, ROOT, SearchTree


@dataclass(frozen=True)
class Selected:
    """What a selection has chosen.

    Attributes:
      nodes: to be expanded together, none of them twice: their children decode in one batch. One
        that is not `expandable` has its own value counted once more. None ends the search.
      pruned: expandable nodes that are not to be expanded any more: their chunks are let go.
    """

    nodes: Sequence[int]
    pruned: Sequence[int] = ()


Selection = Callable[[SearchTree], Selected]
"""Chooses by the tree alone, which it must not keep: it grows."""


@dataclass(frozen=True)
class Puct:
    """Descends from the root to a node without children, by PUCT: predictor and upper confidence.

    At each node it goes to the child with the highest `q + exploration * prior * sqrt(parent's
    visits) / (1 + visits)`, of equals the first (Rosin, "Multi-armed bandits with episode context",
    2011, as Silver et al. have it in "Mastering the game of Go without human knowledge", 2017; UCT
    before it: Kocsis and Szepesvári, "Bandit based Monte-Carlo planning", 2006). `q` is the child's
    mean value, between 0 for the lowest mean in the tree and 1 for the highest (Schrittwieser et
    al., arXiv 1911.08265, appendix B). It ends the search when nothing is expandable.

    Scores are computed for all nodes at once, so that a descent takes no longer in a deep tree.

    Attributes:
      exploration: how much priors and visits count beside values.
      batch: nodes selected at a time. Each that has been counts, for those after it, as if it had
        been evaluated as the lowest (virtual loss); there are fewer when two descents meet.
    """

    exploration: float = 1.25
    batch: int = 1

    def __post_init__(self) -> None:
        _check_positive("batch", self.batch)
        if not self.exploration >= 0:
            raise ValueError(f"exploration must be from 0 up, got {self.exploration}")

    def __call__(self, tree: SearchTree) -> Selected:
        if tree.num_nodes == 1 or not tree.expandable.any():
            return Selected(_first_expandable(tree))
        visits, values = tree.visits.copy(), tree.values.copy()
        lowest = values[1:].min()
        found: list[int] = []
        while len(found) < self.batch:
            path = self._descend(tree, visits, values)
            if path[-1] in found:
                break
            found.append(path[-1])
            if len(found) < self.batch:
                visits[path] += 1
                values[path] += (lowest - values[path]) / visits[path]
        return Selected(found)

    def _descend(
        self, tree: SearchTree, visits: Int[np.ndarray, " N"], values: Float64[np.ndarray, " N"]
    ) -> list[int]:
        """The nodes from the root to one without children."""
        lowest, highest = values[1:].min(), values[1:].max()
        q = (values - lowest) / (highest - lowest) if highest > lowest else np.zeros_like(values)
        explored = np.sqrt(visits[tree.parents]) / (1 + visits)
        scores = np.append(q + self.exploration * tree.priors * explored, -np.inf)
        actions = np.argmax(scores[tree.children], axis=1)  # NOBODY finds the score behind all
        next_nodes = tree.children[np.arange(tree.num_nodes), actions].tolist()
        path = [ROOT]
        while (node := next_nodes[path[-1]]) != NOBODY:
            path.append(node)
        return path


@dataclass(frozen=True)
class BestFirst:
    """The `batch` expandable nodes of the highest raw value, of equals the first."""

    batch: int = 1

    def __post_init__(self) -> None:
        _check_positive("batch", self.batch)

    def __call__(self, tree: SearchTree) -> Selected:
        return Selected(_ranked(tree, tree.expandable)[: self.batch])


@dataclass(frozen=True)
class Beam:
    """Level by level: the `keep` expandable nodes of the highest raw value of the deepest level go
    on together, and the others of that level are pruned."""

    keep: int = 2

    def __post_init__(self) -> None:
        _check_positive("keep", self.keep)

    def __call__(self, tree: SearchTree) -> Selected:
        level = tree.expandable & (tree.depths == tree.depths.max())
        ranked = _ranked(tree, level)
        return Selected(ranked[: self.keep], pruned=ranked[self.keep :])


def _ranked(tree: SearchTree, which: np.ndarray) -> list[int]:
    nodes = np.flatnonzero(which)
    return nodes[np.argsort(-tree.raw_values[nodes], kind="stable")].tolist()


def _first_expandable(tree: SearchTree) -> list[int]:
    return np.flatnonzero(tree.expandable)[:1].tolist()


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
