"""What the engine knows of each request: its tokens, where it stands, and what it hands out."""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jax_chunkattn.engine.text import TextStream
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.tree_nodes import SequenceHandle


class RequestFailed(RuntimeError):
    """A request ended by an error, which is this one's cause."""


class EngineClosed(RuntimeError):
    """The engine has been closed."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, at one position.

    Attributes:
      chosen: of the token that was chosen. NaN where a fork begins with tokens for which its parent
        did not ask, or with another one that its parent did not list.
      top: the likeliest tokens and theirs, the likeliest first; as many as were asked for, or
        all when the vocabulary has fewer.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()

    def of(self, token: int) -> TokenLogprobs:
        """As if `token` had been chosen; NaN when it is not among the likeliest that are known."""
        return TokenLogprobs(dict(self.top).get(token, math.nan), self.top)


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
    """A request's whole answer, as `StreamEvent` has it in pieces."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str


@dataclass(frozen=True)
class Output:
    """The answers to one prompt: `samples` has `SamplingParams.n` of them."""

    index: int
    prompt: tuple[int, ...]
    samples: tuple[Completion, ...]


class Phase(enum.Enum):
    """Where a request stands.

    WAITING for admission (for the first time, or again after a preemption); PREFILL while a part
    of its tokens has no keys and values; DECODE; DONE, for whatever reason.
    """

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(eq=False)
class Work:
    """Tokens that shall be in the pool, for a request or to be pinned.

    Attributes:
      order: when its turn is: (priority, arrival).
      sequence: its place in the tree, while it has one.
      dispatched: tokens whose keys and values it has computed itself, or found, up to here.
      failures: errors while it was being computed, since it last chose a token.
    """

    prompt: tuple[int, ...]
    salt: bytes
    order: tuple[int, ...]
    phase: Phase = field(default=Phase.WAITING, init=False)
    sequence: SequenceHandle | None = field(default=None, init=False)
    dispatched: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)

    @property
    def history(self) -> Sequence[int]:
        """The tokens whose keys and values it needs before it can go on."""
        return self.prompt

    @property
    def samples_next(self) -> bool:
        """Whether its prefill chooses a token from the last position's logits."""
        return False

    @property
    def placed(self) -> SequenceHandle:
        assert self.sequence is not None, "not in the tree"
        return self.sequence


@dataclass(eq=False)
class Pinned(Work):
    """A prefix that stays in the pool until it is released."""


@dataclass(eq=False)
class Request(Work):
    """One sequence to decode.

    `in_flight` counts, of calls to the device whose results are not here yet, the tokens they can
    choose for this request; `writes_in_flight` the positions they can write. `siblings` are samples
    of the same prompt that wait to be forked from this one.
    """

    params: SamplingParams
    text_stream: TextStream | None = None
    on_event: Callable[[StreamEvent], None] | None = None
    hold: bool = False
    siblings: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None
    events: deque[StreamEvent] = field(default_factory=deque, init=False)
    slot: int | None = field(default=None, init=False)
    in_flight: int = field(default=0, init=False)
    writes_in_flight: int = field(default=0, init=False)
    num_forks: int = field(default=0, init=False)
    admitted: bool = field(default=False, init=False)

    @property
    def history(self) -> Sequence[int]:
        """All but the last chosen token, which the next decode step feeds."""
        return (*self.prompt, *self.tokens[:-1]) if len(self.tokens) > 1 else self.prompt

    @property
    def samples_next(self) -> bool:
        return not self.tokens

    @property
    def placed_slot(self) -> int:
        assert self.slot is not None, "not running"
        return self.slot

    @property
    def may_choose(self) -> int:
        """Tokens it can still choose in calls to come, if it does not stop before."""
        return self.params.max_tokens - len(self.tokens) - self.in_flight

    @property
    def wants_logprobs(self) -> bool:
        return self.params.logprobs is not None

    def logprobs_for_fork(
        self, params: SamplingParams, next_token: int | None
    ) -> list[TokenLogprobs]:
        """Of the tokens a fork begins with, if it asks for any: NaN for what is not known."""
        if params.logprobs is None:
            return []
        logprobs = list(self.logprobs) or [TokenLogprobs(math.nan)] * len(self.tokens)
        if next_token is not None:
            logprobs[-1] = logprobs[-1].of(next_token)
        return logprobs

    def raise_error(self) -> None:
        """Raises RequestFailed when an error ended it."""
        if self.error is not None:
            raise RequestFailed(f"the request failed: {self.error}") from self.error

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "not finished"
        return Completion(tuple(self.tokens), self.text, tuple(self.logprobs), self.finish_reason)
