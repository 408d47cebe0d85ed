"""A tree search said plainly: recursion over nodes, and a model without a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jax_chunkattn import Candidate, SamplingParams
from tests.jax_chunkattn.toy import log_probabilities_without_cache


@dataclass(frozen=True)
class Spans:
    """An expansion: the `width` likeliest tokens, each with `more` greedy tokens behind it."""

    width: int
    more: int = 0

    def num_likeliest(self, depth):
        return self.width

    def candidates(self, node):
        total = sum(np.exp(logprob) for _, logprob in node.likeliest)
        return [
            Candidate(token, self.more, SamplingParams(), prior=float(np.exp(logprob) / total))
            for token, logprob in node.likeliest
        ]


@dataclass
class Node:
    """`n` visits, whose values are `w` together; its last `edge` tokens are its own."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    depth: int
    prior: float
    raw: float
    n: int
    w: float
    ended: bool
    edge: int = 0
    children: list[Node] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return self.w / self.n


@dataclass
class PlainSearch:
    """Attributes are `tree_search`'s; `value` is that of one answer's tokens and log-probabilities.
    `nodes` are all, in the order they were made."""

    prompt: list[int]
    spans: Spans
    value: Callable[[tuple[int, ...], tuple[float, ...]], float]
    exploration: float = 1.25
    max_tokens: int = 48
    max_depth: int | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        self.nodes = [Node((), (), 0, 1.0, np.nan, 0, 0.0, False)]

    def puct(self, simulations: int) -> None:
        for _ in range(simulations):
            self.simulate(self.nodes[0])

    def best_first(self, simulations: int) -> None:
        for _ in range(simulations):
            some = [node for node in self.nodes if not node.ended and not node.children]
            self.expand_there(self.nodes[0], max(some, key=lambda node: node.raw))

    def beam(self, keep: int, levels: int) -> None:
        level = [self.nodes[0]]
        for _ in range(levels):
            best = sorted((node for node in level if not node.ended), key=lambda node: -node.raw)
            for node in best[:keep]:
                self.expand_there(self.nodes[0], node)
            level = [child for node in best[:keep] for child in node.children]

    def simulate(self, node: Node) -> list[float]:
        """The values of what was evaluated below a node, which it and all above count."""
        values = self.simulate(self.promising(node)) if node.children else self.expand(node)
        node.n, node.w = node.n + len(values), node.w + sum(values)
        return values

    def expand_there(self, node: Node, leaf: Node) -> list[float]:
        """The same, at a certain leaf; nothing where that is not below the node."""
        if node is leaf:
            values = self.expand(leaf)
        else:
            values = [
                value
                for child in node.children
                if leaf.tokens[: len(child.tokens)] == child.tokens
                for value in self.expand_there(child, leaf)
            ]
        node.n, node.w = node.n + len(values), node.w + sum(values)
        return values

    def promising(self, node: Node) -> Node:
        means = [other.mean for other in self.nodes[1:]]
        lowest, span = min(means), max(means) - min(means)

        def score(child: Node) -> float:
            q = (child.mean - lowest) / span if span else 0.0
            return q + self.exploration * child.prior * np.sqrt(node.n) / (1 + child.n)

        return max(node.children, key=score)

    def expand(self, node: Node) -> list[float]:
        if node.ended:
            return [node.raw]
        logprobs = self.next(node.tokens)
        starts = np.argsort(-logprobs, kind="stable")[: self.spans.width]
        total = np.exp(logprobs[starts]).sum()
        for start in starts:
            prior = float(np.exp(logprobs[start]) / total)
            node.children.append(self.child(node, int(start), prior))
            self.nodes.append(node.children[-1])
        return [child.raw for child in node.children]

    def child(self, node: Node, token: int, prior: float) -> Node:
        tokens, logprobs, more = node.tokens, node.logprobs, self.spans.more
        while True:
            logprobs = (*logprobs, float(self.next(tokens)[token]))
            tokens = (*tokens, token)
            if tokens[-1] in self.stop_tokens or len(tokens) == self.max_tokens or not more:
                break
            token, more = int(self.next(tokens).argmax()), more - 1
        ended = tokens[-1] in self.stop_tokens or len(tokens) == self.max_tokens
        ended |= node.depth + 1 == self.max_depth
        value = self.value(tokens, logprobs)
        edge = len(tokens) - len(node.tokens)
        return Node(tokens, logprobs, node.depth + 1, prior, value, 1, value, ended, edge)

    def next(self, tokens: tuple[int, ...]) -> np.ndarray:
        return log_probabilities_without_cache((*self.prompt, *tokens))
