"""What the engine's state machine submits, and what it remembers of each request.

Prompts are made of few beginnings, so that sharing, partial chunks and twins are common; a bias
towards a few bytes makes text, stop strings and stop tokens common.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from hypothesis import strategies as st

from jax_chunkattn import PinnedPrefix, RequestFailed, RequestHandle, SamplingParams, StreamEvent

STOP_TOKENS = (ord(" "), 7)  # the engine's own
LETTERS = {**dict.fromkeys((*b"ab", *"é".encode()), 8.0), ord(" "): 6.0}
LONGEST_PROMPT = 70
BEGINNINGS = np.random.default_rng(0).integers(0, 256, (3, 64)).tolist()

PROMPTS = st.builds(
    lambda begin, length, rest: begin[:length] + rest,
    st.sampled_from(BEGINNINGS),
    st.sampled_from([1, 7, 16, 20, 32, 36, 48, 60]),
    st.lists(st.integers(0, 2), max_size=4),
)
SUFFIXES = st.lists(st.integers(0, 2), min_size=1, max_size=4)
TEXTS = st.sampled_from(["once upon a time, ", "once upon a time, there was", "é" * 11])
STEPS = st.integers(0, 6)
SALTS = st.sampled_from(["", "", "", "tenant"])
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 5, 9, 17, 33]),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 0, 20]),
    top_p=st.sampled_from([1.0, 1.0, 1.0, 0.9]),
    seed=st.integers(0, 3),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.5]),
    logit_bias=st.sampled_from([{}, LETTERS]),
    stop=st.sampled_from([(), (), ("ab",), ("bé", "aa")]),
    stop_token_ids=st.sampled_from([(), (), (ord("b"),)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, None, 0, 3]),
)
LONG = st.builds(SamplingParams, st.just(49), st.sampled_from([0.0, 1.0]), seed=st.integers(0, 3))


class CallbackError(Exception):
    """Raised by a callback on purpose."""


@dataclass
class Listener:
    """An `on_event` callback that keeps what it is called with and, at one event, does something.

    Attributes:
      act: called with the index of each event.
      events: seen.
    """

    act: Callable[[int], None] = lambda _: None
    events: list[StreamEvent] = field(default_factory=list)

    def __call__(self, event: StreamEvent) -> None:
        self.events.append(event)
        self.act(len(self.events))


@dataclass(eq=False)
class Tracked:
    """A request, what it began with, and what of it has been seen.

    Attributes:
      namespace: what its prompt shares chunks with.
      hold: its chunks are to be kept when it has ended, as far as is known.
      siblings: samples that wait to be forked from it.
      parent: that it was forked from.
      given, given_text, given_logprobs: what it had when it was made: nothing, but for forks.
      read: events that streams of it gave.
      stream: one that has been left open.
      tokens, text: when last looked at.
      version: of the weights, when it was made.
      changes: how many tokens it had whenever the weights were replaced.
      verified: its end has been seen and checked.
    """

    handle: RequestHandle
    namespace: object
    listener: Listener | None = None
    hold: bool = False
    siblings: list[Tracked] = field(default_factory=list)
    parent: Tracked | None = None
    read: list[StreamEvent] = field(default_factory=list)
    stream: Generator[StreamEvent] | None = None
    num_forks: int = 0
    version: int = 0
    changes: list[int] = field(default_factory=list)
    verified: bool = False

    def __post_init__(self):
        self.given = self.tokens = self.handle.tokens
        self.given_text = self.text = self.handle.text
        self.given_logprobs = self.handle.logprobs

    def __repr__(self) -> str:
        return repr(self.handle)

    def descends_from(self, other: Tracked) -> bool:
        """Whether it is the other, or a fork of it, or a fork of a fork."""
        return self is other or (self.parent is not None and self.parent.descends_from(other))

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Which of its own tokens were chosen by which version: from, to before, version."""
        begins = [len(self.given), *self.changes]
        ends = [*self.changes, len(self.handle.tokens)]
        versions = range(self.version, self.version + len(begins))
        return list(zip(begins, ends, versions, strict=True))

    def note_growth(self) -> None:
        """What has been chosen stays as it is, and callbacks have been told all of it."""
        tokens, text = self.handle.tokens, self.handle.text
        assert tokens[: len(self.tokens)] == self.tokens
        assert text.startswith(self.text)
        assert len(tokens) <= self.handle.params.max_tokens
        assert self.handle.done == (self.handle.finish_reason is not None)
        self.tokens, self.text = tokens, text
        if self.listener is not None:
            self.require_pieces(self.listener.events, whole=self.handle.error is None)

    def require_pieces(self, events: list[StreamEvent], *, whole: bool) -> None:
        """Asserts that these events have every token once and in order, to the end if `whole`."""
        tokens = sum((event.tokens for event in events), self.given)
        text = self.given_text + "".join(event.text for event in events)
        logprobs = sum((event.logprobs for event in events), self.given_logprobs)
        assert tokens == self.tokens[: len(tokens)]
        assert self.text.startswith(text)
        assert logprobs == self.handle.logprobs[: len(logprobs)]
        assert all(event.finish_reason is None for event in events[:-1])
        if whole:
            assert (tokens, text, logprobs) == (self.tokens, self.text, self.handle.logprobs)
            reason = self.handle.finish_reason
            last = events[-1].finish_reason if events else None
            assert last == (None if reason == "error" else reason)

    def read_events(self, count: int) -> None:
        """Takes up to `count` events from a stream of it, which may advance the engine."""
        for _ in range(count):
            if self.stream is None:
                self.stream = cast(Generator, self.handle.stream())
            try:
                self.read.append(next(self.stream))
            except (StopIteration, RequestFailed):
                assert self.handle.done
                self.stream = None
                break

    def leave_stream(self) -> None:
        """As a consumer does that breaks out of its loop."""
        assert self.stream is not None
        self.stream.close()
        self.stream = None

    def read_to_the_end(self) -> None:
        """Of a request that is done: what streams gave, all together, is its answer."""
        self.read_events(len(self.tokens) + 2)
        assert self.stream is None
        self.require_pieces(self.read, whole=True)


@dataclass(eq=False)
class TrackedPin:
    handle: PinnedPrefix
    namespace: object
    tokens: list[int]


def prefixes(tokens, chunk_size: int, namespace: object) -> set:
    """What names each whole chunk."""
    ends = range(chunk_size, len(tokens) + 1, chunk_size)
    return {(namespace, tuple(tokens[:end])) for end in ends}
