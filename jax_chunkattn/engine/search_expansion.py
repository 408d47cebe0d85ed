"""How a partial answer of a tree search may go on, and what it is worth: the search's callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jax_chunkattn.sampling import MAX_LOGPROBS, SamplingParams, fork_seed


@dataclass(frozen=True)
class SearchNode:
    """What callbacks are told of a node.

    Attributes:
      index: in the `SearchTree`; that of a node to be evaluated is the one it will have.
      depth: edges from the root.
      tokens: the partial answer, from its beginning.
      logprobs: of its tokens, natural logarithms, by the model's own distribution.
      likeliest: next tokens with their log-probabilities, the likeliest first: as many as
        `Expansion.num_likeliest` asks for. Empty where it can have no children.
      stopped: its last token is a stop token.
    """

    index: int
    depth: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[tuple[int, float], ...]
    stopped: bool


@dataclass(frozen=True)
class Candidate:
    """An edge to a child that is to be made.

    Attributes:
      token: its first token; None where the node has no `likeliest`. The log-probability of one
        that is not among these is NaN.
      num_sampled: tokens that are sampled behind it; fewer if one is a stop token.
      sampling: how. Give a seed if the search is to be repeated. Its `max_tokens`, `logprobs` and
        `ignore_eos` do not count; it can have neither samples nor anything that stops.
      prior: how promising the edge is beside others of its node, from 0 up.

    Raises:
      ValueError: for an edge without tokens, or anything else that cannot be.
    """

    token: int | None = None
    num_sampled: int = 0
    sampling: SamplingParams = SamplingParams()
    prior: float = 1.0

    def __post_init__(self) -> None:
        if self.num_sampled < 0 or (self.token is None and not self.num_sampled):
            raise ValueError(
                f"a candidate needs a token, or to sample some: got token={self.token}, "
                f"num_sampled={self.num_sampled}"
            )
        if self.sampling.n != 1 or self.sampling.stop or self.sampling.stop_token_ids:
            raise ValueError(
                "a candidate's sampling can have neither n, stop nor stop_token_ids: give the "
                "search its stop_tokens, and make a candidate for each sample"
            )
        if not (self.prior >= 0 and math.isfinite(self.prior)):
            raise ValueError(f"a candidate's prior must be a number from 0 up, got {self.prior}")


class Expansion(Protocol):
    """Says what children a node gets."""

    def num_likeliest(self, depth: int) -> int:
        """How many of the likeliest next tokens nodes of a depth know, at most `MAX_LOGPROBS`.

        Each candidate of such a node begins with a `token`. 0 has nodes go on by sampling alone;
        the root knows 1 at least.
        """
        ...

    def candidates(self, node: SearchNode) -> Sequence[Candidate]:
        """The edges to all its children; none where it shall have none."""
        ...


Evaluation = Callable[[Sequence[SearchNode]], Sequence[float]]
"""What each of some new nodes is worth, a finite number, the more the better: a verifier, say."""


def mean_logprob(nodes: Sequence[SearchNode]) -> list[float]:
    """The mean log-probability of each answer's tokens."""
    return [math.fsum(node.logprobs) / len(node.logprobs) for node in nodes]


@dataclass(frozen=True)
class NextTokens:
    """A child for each of the `width` likeliest next tokens; priors are their probabilities,
    divided by the sum of them."""

    width: int = 4

    def __post_init__(self) -> None:
        _check_width(self.width)

    def num_likeliest(self, depth: int) -> int:
        return self.width

    def candidates(self, node: SearchNode) -> list[Candidate]:
        weights = [math.exp(logprob) for _, logprob in node.likeliest]
        total = math.fsum(weights)
        return [
            Candidate(token, prior=weight / total)
            for (token, _), weight in zip(node.likeliest, weights, strict=True)
        ]


@dataclass(frozen=True)
class Continuations:
    """`width` children, each of `num_tokens` sampled tokens; all are equally promising.

    The root's begin with its `width` likeliest tokens, so that no two of them are the same.

    Attributes:
      sampling: how; each child has a seed made of this one's, of its parent's index and of its own
        number, or if there is none a fresh one.
    """

    width: int = 3
    num_tokens: int = 12
    sampling: SamplingParams = SamplingParams(temperature=0.8, seed=0)

    def __post_init__(self) -> None:
        _check_width(self.width)
        if self.num_tokens < 2:
            raise ValueError(
                f"num_tokens must be at least 2, got {self.num_tokens}: the root's children begin "
                "with one that they are given"
            )

    def num_likeliest(self, depth: int) -> int:
        return 0 if depth else self.width

    def candidates(self, node: SearchNode) -> list[Candidate]:
        seed = self.sampling.seed
        own = None if seed is None else fork_seed(seed, node.index)

        def sampling(number: int) -> SamplingParams:
            return replace(self.sampling, seed=None if own is None else fork_seed(own, number))

        starts = [token for token, _ in node.likeliest] or [None] * self.width
        prior = 1 / len(starts)
        return [
            Candidate(token, self.num_tokens - (token is not None), sampling(number), prior)
            for number, token in enumerate(starts)
        ]


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_LOGPROBS:
        raise ValueError(f"width must be from 1 to {MAX_LOGPROBS}, got {width}")
