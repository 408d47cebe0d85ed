"""What an engine hands out: events, answers, and the errors that end requests."""

from __future__ import annotations

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
    that a fork has of its parent.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str
    seed: int


@dataclass(frozen=True)
class Output:
    """The answers to one prompt: `samples` has `SamplingParams.n` of them."""

    index: int
    prompt: tuple[int, ...]
    samples: tuple[Completion, ...]
