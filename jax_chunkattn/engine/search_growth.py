"""Growing the tree of a search: forks are started, waited for, evaluated and let go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan, nan

from jax_chunkattn.engine.handle import RequestHandle
from jax_chunkattn.engine.search_expansion import Candidate, Evaluation, Expansion, SearchNode
from jax_chunkattn.engine.search_selection import Selected
from jax_chunkattn.engine.search_tree import ROOT, GrowingTree, NewNode
from jax_chunkattn.sampling import MAX_LOGPROBS


@dataclass(frozen=True)
class _Leaf:
    """A node that may be expanded, and the finished request whose forks its children will be."""

    node: SearchNode
    handle: RequestHandle


@dataclass(frozen=True)
class _Edge:
    """A child on its way: its answer will have `length` tokens unless it stops before. None
    decodes it if its tokens are known already and nobody asks what may follow."""

    parent: SearchNode
    candidate: Candidate
    length: int
    handle: RequestHandle | None
    expandable: bool


class Growth:
    """The tree, and the requests at its leaves.

    Attributes:
      tree: so far.
    """

    def __init__(
        self,
        expand: Expansion,
        evaluate: Evaluation,
        max_tokens: int,
        max_depth: int | None,
        stops: frozenset[int],
    ):
        self.tree = GrowingTree()
        self._expand = expand
        self._evaluate = evaluate
        self._max_tokens = max_tokens
        self._max_depth = max_depth
        self._stops = stops
        self._leaves: dict[int, _Leaf] = {}

    def num_likeliest(self, depth: int) -> int:
        """What the expansion says, checked."""
        number, least = self._expand.num_likeliest(depth), 0 if depth else 1
        if not least <= number <= MAX_LOGPROBS:
            raise ValueError(
                f"num_likeliest({depth}) must be from {least} to {MAX_LOGPROBS}, got {number}"
            )
        return number

    def plant(self, root: RequestHandle) -> None:
        """Makes the root of a request that chooses one token."""
        likeliest = root.result().logprobs[0].top
        self._leaves[ROOT] = _Leaf(SearchNode(ROOT, 0, (), (), likeliest, False), root)

    def grow(self, selected: Selected) -> None:
        """Expands nodes together, all or none, and visits those again that cannot be expanded."""
        self._check(selected)
        for index in selected.pruned:
            self.tree.close(index)
            self._leaves.pop(index).handle.prune()
        leaves = [self._leaves[index] for index in selected.nodes if index in self._leaves]
        again = [index for index in selected.nodes if index not in self._leaves]
        started = [self._start(leaf) for leaf in leaves]  # all before any is waited for
        made = self._finish([edge for edges in started for edge in edges])
        for leaf, edges in zip(leaves, started, strict=True):
            own, made = made[: len(edges)], made[len(edges) :]
            if own:
                self.tree.add(leaf.node.index, own)
            else:
                self.tree.close(leaf.node.index)
                again.append(leaf.node.index)
            self._leaves.pop(leaf.node.index).handle.release()
        for index in again:
            if index != ROOT:
                self.tree.visit_again(index)

    def _check(self, selected: Selected) -> None:
        """Raises ValueError for what cannot be selected."""
        nodes, pruned = selected.nodes, selected.pruned
        if len(set(nodes) | set(pruned)) < len(nodes) + len(pruned):
            raise ValueError(f"selected twice: got nodes {nodes} and pruned {pruned}")
        for index in nodes:
            if index not in self._leaves and not self.tree.may_be_visited(index):
                raise ValueError(
                    f"selected node {index} of {self.tree.num_nodes}: it must be one without "
                    "children, and the root only as long as it is expandable"
                )
        for index in pruned:
            if index not in self._leaves:
                raise ValueError(f"pruned node {index}, which is not expandable")

    def _start(self, leaf: _Leaf) -> list[_Edge]:
        """Forks all children of a node."""
        return [self._fork(leaf, candidate) for candidate in self._expand.candidates(leaf.node)]

    def _fork(self, leaf: _Leaf, candidate: Candidate) -> _Edge:
        node, token = leaf.node, candidate.token
        if (token is None) == bool(node.likeliest):
            raise ValueError(
                f"node {node.index} knows its {len(node.likeliest)} likeliest next tokens: its "
                f"candidates must name one if there are any, and else none, got token={token}"
            )
        given = len(node.tokens) + (token is not None)
        stops = token in self._stops
        length = given if stops else min(given + candidate.num_sampled, self._max_tokens)
        depth = node.depth + 1
        expandable = not stops and length < self._max_tokens and depth != self._max_depth
        num_likeliest = self.num_likeliest(depth) if expandable else 0
        if length == given and not num_likeliest:
            if expandable:
                raise ValueError(
                    f"a candidate of node {node.index} samples nothing, and num_likeliest({depth}) "
                    "is 0: nothing could follow it"
                )
            return _Edge(node, candidate, length, None, False)
        params = replace(
            candidate.sampling,
            max_tokens=length + bool(num_likeliest),
            logprobs=num_likeliest,
            ignore_eos=True,
            stop_token_ids=sorted(self._stops) if length > given else (),
        )
        handle = leaf.handle.fork(params, next_token=token, hold=expandable)
        return _Edge(node, candidate, length, handle, expandable)

    def _finish(self, edges: Sequence[_Edge]) -> list[NewNode]:
        """The children at edges, when all have ended and been evaluated."""
        first = self.tree.num_nodes
        nodes = [self._wait(edge, first + number) for number, edge in enumerate(edges)]
        values = [float(value) for value in self._evaluate(nodes)] if nodes else []
        if len(values) != len(nodes):
            raise ValueError(
                f"evaluate must give a value for each node: {len(nodes)} of them, got {len(values)}"
            )
        for node, value in zip(nodes, values, strict=True):
            if not isfinite(value):
                unknown = any(isnan(one) for one in node.logprobs)
                hint = ", one of whose tokens has no known log-probability" if unknown else ""
                which = f"node {node.index}{hint}"
                raise ValueError(f"evaluate must give finite numbers, got {value} for {which}")
        return [
            NewNode(
                node.tokens[len(edge.parent.tokens) :],
                node.logprobs[len(edge.parent.tokens) :],
                edge.candidate.prior,
                value,
                node.stopped,
                node.index in self._leaves,
            )
            for edge, node, value in zip(edges, nodes, values, strict=True)
        ]

    def _wait(self, edge: _Edge, index: int) -> SearchNode:
        """The child at an edge, when its request has ended; a leaf if it may be expanded."""
        parent, token, handle = edge.parent, edge.candidate.token, edge.handle
        depth, likeliest = parent.depth + 1, ()
        if handle is None:
            assert token is not None, "neither given nor sampled"
            tokens = (*parent.tokens, token)
            logprobs = (*parent.logprobs, dict(parent.likeliest).get(token, nan))
        else:
            done = handle.result()
            tokens = done.tokens[: edge.length]
            own = done.logprobs[len(parent.tokens) : len(tokens)]
            logprobs = (*parent.logprobs, *(one.chosen for one in own))
            likeliest = done.logprobs[-1].top
        stopped = tokens[-1] in self._stops
        if handle is None or stopped or not edge.expandable:
            if handle is not None:
                handle.release()
            return SearchNode(index, depth, tokens, logprobs, (), stopped)
        node = SearchNode(index, depth, tokens, logprobs, likeliest, stopped)
        self._leaves[index] = _Leaf(node, handle)
        return node
