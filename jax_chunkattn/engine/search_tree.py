"""What a tree search has found: its nodes, as arrays.

The shape is that of mctx (https://github.com/google-deepmind/mctx): a frozen record of arrays over
nodes, in the order in which they were made. It is for one prompt, an edge is one token or several,
and what mctx keeps of each child with its parent is found here at the child.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32

ROOT = 0
NOBODY = -1  # a parent or child that is none


@dataclass(frozen=True, eq=False)
class SearchTree:
    """N partial answers, each one edge longer than its parent's; node 0 is the empty one.

    A is the most children of a node, T the tokens of all edges together.

    Attributes:
      parents: always nodes of smaller index; -1 for the root.
      actions: which of its parent's children each is; -1 for the root.
      children: by action; -1 where there is none.
      depths: edges from the root.
      priors: what the expansion gave.
      raw_values: what the evaluation gave; NaN for the root, which is not evaluated.
      visits: how many evaluations there were of a node and of all below it. A node that could not
        be expanded when it was selected counts once more each time.
      values: the mean of these evaluations; NaN for a root without children.
      expandable: has no children, and may come to have some.
      stopped: the answer ends with a stop token.
      tokens: of the edges to all nodes, one after another.
      logprobs: of these tokens, natural logarithms, by the model's own distribution.
      ends: where the tokens of each node's edge end; they begin where those before end.
    """

    parents: Int32[np.ndarray, " N"]
    actions: Int32[np.ndarray, " N"]
    children: Int32[np.ndarray, "N A"]
    depths: Int32[np.ndarray, " N"]
    priors: Float64[np.ndarray, " N"]
    raw_values: Float64[np.ndarray, " N"]
    visits: Int32[np.ndarray, " N"]
    values: Float64[np.ndarray, " N"]
    expandable: Bool[np.ndarray, " N"]
    stopped: Bool[np.ndarray, " N"]
    tokens: Int32[np.ndarray, " T"]
    logprobs: Float64[np.ndarray, " T"]
    ends: Int32[np.ndarray, " N"]

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    def children_of(self, node: int) -> list[int]:
        """Those it has, by action."""
        return self.children[node, self.children[node] != NOBODY].tolist()

    def path(self, node: int) -> list[int]:
        """All nodes from the root to this one, both among them."""
        found = [node]
        while (node := int(self.parents[node])) != NOBODY:
            found.append(node)
        return found[::-1]

    def answer(self, node: int) -> tuple[int, ...]:
        """The tokens of all edges from the root to a node."""
        return tuple(self._along(self.tokens, node))

    def answer_logprobs(self, node: int) -> tuple[float, ...]:
        """Of the tokens of `answer`."""
        return tuple(self._along(self.logprobs, node))

    def best(self) -> int:
        """The childless node of the highest raw value, if one has stopped of those that have; of
        equals the first. The root when there is no other."""
        childless = np.flatnonzero((self.children == NOBODY).all(axis=1))
        stopped = childless[self.stopped[childless]]
        some = stopped if len(stopped) else childless
        return int(some[np.argmax(self.raw_values[some])])

    def visit_distribution(self, node: int = ROOT) -> Float64[np.ndarray, " A"]:
        """How the visits of a node's children are shared out among them, by action, 0 where there
        is none: what a policy may be trained towards. All 0 for a node without children."""
        has = self.children[node] != NOBODY
        visits = np.where(has, self.visits[self.children[node]], 0).astype(np.float64)
        return visits / max(1.0, visits.sum())

    def _along(self, each: np.ndarray, node: int) -> list[Any]:
        edges = [(self.ends[one - 1], self.ends[one]) for one in self.path(node)[1:]]
        return [value for begin, end in edges for value in each[begin:end].tolist()]


class NewNode(NamedTuple):
    """A node to come, and the edge to it; fields as in `SearchTree`."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    prior: float
    raw_value: float
    stopped: bool
    expandable: bool


ROWS = 64  # that a new array has room for; twice as many each time it is full
BY_TOKEN = ("tokens", "logprobs")  # the other arrays have a row for each node


class GrowingTree:
    """A `SearchTree` that takes nodes and visits.

    Attributes:
      num_nodes: so far.
    """

    def __init__(self) -> None:
        self.num_nodes = 0
        self._num_tokens = 0
        self._arrays = {
            "children": np.full((ROWS, 1), NOBODY, np.int32),
            **{name: np.zeros(ROWS, np.int32) for name in ("parents", "actions", "depths")},
            **{name: np.zeros(ROWS, np.int32) for name in ("visits", "ends", "tokens")},
            **{name: np.zeros(ROWS, np.float64) for name in ("priors", "raw_values", "values")},
            **{name: np.zeros(ROWS, np.bool_) for name in ("expandable", "stopped")},
            "logprobs": np.zeros(ROWS, np.float64),
        }
        self._parents: list[int] = []  # where Python reads them faster
        self._totals: list[float] = []
        self._append(NOBODY, NOBODY, NewNode((), (), 1.0, math.nan, False, True))

    def add(self, parent: int, children: Sequence[NewNode]) -> None:
        """Gives a node all its children at once, each with one visit, which all above count."""
        self._need_columns(len(children))
        for action, child in enumerate(children):
            self._arrays["children"][parent, action] = self.num_nodes
            self._append(parent, action, child)
        self.close(parent)
        self._count(parent, len(children), math.fsum(child.raw_value for child in children))

    def may_be_visited(self, node: int) -> bool:
        """Whether it is one without children, and has a value."""
        is_other = ROOT < node < self.num_nodes
        return is_other and self._arrays["children"][node, 0] == NOBODY

    def close(self, node: int) -> None:
        """It will have no children, or no others."""
        self._arrays["expandable"][node] = False

    def visit_again(self, node: int) -> None:
        """Counts a node's own value once more."""
        self._count(node, 1, float(self._arrays["raw_values"][node]))

    def view(self) -> SearchTree:
        """As it stands, without copying; not to be read when it has grown."""
        return SearchTree(**{field.name: self._read(field.name) for field in fields(SearchTree)})

    def copy(self) -> SearchTree:
        """As it stands."""
        return SearchTree(**{name: array.copy() for name, array in vars(self.view()).items()})

    def _append(self, parent: int, action: int, node: NewNode) -> None:
        is_root = parent == NOBODY
        index, begin = self.num_nodes, self._num_tokens
        end = begin + len(node.tokens)
        self._need_rows(index + 1, end)
        row = {
            "parents": parent,
            "actions": action,
            "depths": 0 if is_root else self._arrays["depths"][parent] + 1,
            "priors": node.prior,
            "raw_values": node.raw_value,
            "values": node.raw_value,
            "visits": 0 if is_root else 1,
            "stopped": node.stopped,
            "expandable": node.expandable,
            "ends": end,
        }
        for name, entry in row.items():
            self._arrays[name][index] = entry
        self._arrays["tokens"][begin:end] = node.tokens
        self._arrays["logprobs"][begin:end] = node.logprobs
        self._parents.append(parent)
        self._totals.append(0.0 if is_root else node.raw_value)
        self.num_nodes, self._num_tokens = index + 1, end

    def _count(self, node: int, times: int, total: float) -> None:
        """Visits of a node, which all above it count too."""
        path = []
        while node != NOBODY:
            path.append(node)
            self._totals[node] += total
            node = self._parents[node]
        visits = self._arrays["visits"]
        visits[path] += times
        self._arrays["values"][path] = [self._totals[one] for one in path] / visits[path]

    def _read(self, name: str) -> np.ndarray:
        view = self._arrays[name][: self._num_tokens if name in BY_TOKEN else self.num_nodes]
        view.flags.writeable = False
        return view

    def _need_rows(self, nodes: int, tokens: int) -> None:
        for name, array in self._arrays.items():
            needed, room = tokens if name in BY_TOKEN else nodes, len(array)
            if needed > room:
                self._extend(name, 0, max(room, needed - room))

    def _need_columns(self, columns: int) -> None:
        more = columns - self._arrays["children"].shape[1]
        if more > 0:
            self._extend("children", 1, more)

    def _extend(self, name: str, axis: int, more: int) -> None:
        array = self._arrays[name]
        widths = [(0, more if each == axis else 0) for each in range(array.ndim)]
        filler = NOBODY if name == "children" else 0
        self._arrays[name] = np.pad(array, widths, constant_values=filler)
