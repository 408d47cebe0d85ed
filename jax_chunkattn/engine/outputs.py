"""What an engine hands out: events, answers, and the errors that end requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax_chunkattn.sampling import TokenLogprobs


class RequestFailed(RuntimeError):
    """A request ended by an error, which is this one's cause."""


class EngineClosed(RuntimeError):
    """The engine has been closed."""


@dataclass(frozen=True)
class StreamEvent:
    """What one call to the device added to a request.

    Attributes:
      tokens: chosen tokens.
      text: text that is now final; empty without a tokenizer.
      logprobs: one for each token, when asked for.
      finish_reason: None while the request runs; "stop", "length" or "abort" in its last event.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """A request's whole answer, as `StreamEvent` has it in pieces.

    `seed` is what its tokens were drawn with: given again, alone, it draws them again; those apart
    that a fork has of its parent. `weights` are the versions of the model's weights that chose
    them, in their order: 0 are those that the engine was made with.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str
    seed: int
    weights: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Score:
    """How likely a model finds tokens behind a prefix.

    Attributes:
      tokens: that were scored.
      logprobs: one for each, with as many of the likeliest as were asked for.
      weights: the version of the model's weights, the same for all of one call.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    weights: int = 0

    @property
    def total(self) -> float:
        """The natural logarithm of the probability of all of them, one behind another."""
        return math.fsum(one.chosen for one in self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether each was the likeliest.

        Raises ValueError when the likeliest were not asked for.
        """
        if not all(one.top for one in self.logprobs):
            raise ValueError("is_greedy needs the likeliest tokens: ask for top=1 or more")
        likeliest = tuple(one.top[0][0] for one in self.logprobs)
        return likeliest == self.tokens


@dataclass(frozen=True)
class Output:
    """The answers to one prompt: `samples` has `SamplingParams.n` of them."""

    index: int
    prompt: tuple[int, ...]
    samples: tuple[Completion, ...]
