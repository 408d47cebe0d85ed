"""Keeping account of a soak: every request that was started, how it ended, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_chunkattn import RequestHandle, SamplingParams

SHOWN_PROBLEMS = 5


@dataclass(eq=False)
class Tracked:
    """A request under way.

    Attributes:
      begun_with: tokens it had when it was started: a fork has its parent's.
      rechecks: whether a fresh engine must give the same answer: not when a token was replaced.
      aborted: whether somebody gave it up.
      release_after: how long it is kept when it has finished, in the time that a request takes.
    """

    handle: RequestHandle
    begun_with: int = 0
    rechecks: bool = True
    aborted: bool = False
    release_after: float = 0.0


@dataclass(frozen=True)
class Finished:
    """A greedy request to be computed again."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: tuple[int, ...]


class Account:
    """All requests of a run; memory does not grow with their number.

    Attributes:
      started: requests so far.
      ended: how many ended for each reason.
      sample: greedy ones among them, each with the same chance to be in it.
      problems: the first things that were wrong, in words; `num_problems` counts all.
    """

    def __init__(self, random: np.random.Generator, sample_size: int):
        self.started = 0
        self.ended: Counter[str] = Counter()
        self.sample: list[Finished] = []
        self.problems: list[str] = []
        self.num_problems = 0
        self._live: dict[Tracked, None] = {}
        self._random = random
        self._sample_size = sample_size
        self._num_greedy = 0

    @property
    def live(self) -> list[Tracked]:
        """Requests that have not ended."""
        return list(self._live)

    def start(self, tracked: Tracked) -> None:
        """Notes a request that has just been started."""
        self.started += 1
        self._live[tracked] = None

    def collect(self) -> Iterator[Tracked]:
        """Those that have ended since the last call, each checked and noted."""
        for tracked in self.live:
            if tracked.handle.done:
                del self._live[tracked]
                self.ended[tracked.handle.finish_reason or "none"] += 1
                for problem in problems_of(tracked):
                    self.report(problem)
                self._maybe_sample(tracked)
                yield tracked

    def report(self, problem: str) -> None:
        """Notes something that must not be."""
        self.num_problems += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append(problem)

    def _maybe_sample(self, tracked: Tracked) -> None:
        handle = tracked.handle
        complete = handle.finish_reason in ("stop", "length")
        if not (complete and tracked.rechecks and handle.params.temperature == 0):
            return
        finished = Finished(handle.prompt, handle.params, handle.tokens)
        self._num_greedy += 1
        if len(self.sample) < self._sample_size:
            self.sample.append(finished)
        elif (place := int(self._random.integers(self._num_greedy))) < self._sample_size:
            self.sample[place] = finished


def problems_of(tracked: Tracked) -> Iterator[str]:
    """What is wrong with a request that has ended, if anything."""
    handle, params = tracked.handle, tracked.handle.params
    reason, tokens = handle.finish_reason, handle.tokens
    if reason == "error":
        yield f"a request failed: {handle.error!r}"
    elif reason == "abort":
        if not tracked.aborted:
            yield "a request was aborted that nobody gave up"
    elif reason == "length":
        if len(tokens) != params.max_tokens:
            yield f"a request of {params.max_tokens} tokens ended by length at {len(tokens)}"
    elif reason == "stop":
        if not params.stop and tokens[-1] not in params.stop_token_ids:
            yield "a request stopped at a token that does not stop it"
    else:
        yield f"a request ended for no known reason: {reason!r}"
    if reason != "error":
        streamed = [token for event in handle.stream() for token in event.tokens]
        if (*tokens[: tracked.begun_with], *streamed) != tokens:
            yield f"a request of {len(tokens)} tokens streamed {len(streamed)}, not those"
    if params.logprobs is not None and len(handle.logprobs) != len(tokens):
        yield f"a request has {len(tokens)} tokens and {len(handle.logprobs)} log-probabilities"
