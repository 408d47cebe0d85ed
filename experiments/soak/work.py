"""The work of a soak: what requests ask for, when they come, and what becomes of them meanwhile."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_chunkattn import SamplingParams

SALTS = ("", "", "", "", "alice", "bob")
PREFIX_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 4, 3 / 8, 1 / 2)  # of the context
LEVELS = (0.0, 0.3, 0.9, 1.5)  # of what the engine can serve
REMEMBERED = 64


@dataclass(frozen=True)
class Arrival:
    """A request, and what is to happen to it; times are in the time that a request takes.

    Attributes:
      hold: keep it when it has finished, until `release_after` that.
      abort_after, fork_after: its arrival, or None.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str = ""
    priority: int = 0
    hold: bool = False
    abort_after: float | None = None
    fork_after: float | None = None
    release_after: float = 1.0


class Workload:
    """Random requests, one after another. Prefixes are shared by many; answers are built upon.

    Args:
      vocab_size: ids are drawn below it.
      context_tokens: longest prompt and answer together.
      stop_strings: whether the engine can look for text.
    """

    def __init__(
        self,
        random: np.random.Generator,
        *,
        vocab_size: int,
        context_tokens: int,
        stop_strings: bool,
    ):
        self._random = random
        self._vocab_size = vocab_size
        self.context_tokens = context_tokens
        self._stop_strings = stop_strings
        self.prefixes = [self._tokens(int(share * context_tokens)) for share in PREFIX_SHARES]
        self.prefixes[-1] = (*self.prefixes[2], *self.prefixes[-1])[: context_tokens // 2]
        self._conversations: deque[tuple[int, ...]] = deque(maxlen=REMEMBERED)

    def remember(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Notes a conversation that later requests may go on with."""
        self._conversations.append((*prompt, *answer))

    def next(self) -> Arrival:
        """The next request."""
        random = self._random
        prompt, params = self._prompt(), self._params()
        room = self.context_tokens - params.max_tokens
        return Arrival(
            prompt[:room],
            params,
            salt=str(random.choice(SALTS)),
            priority=int(random.choice((-1, 0, 0, 0, 0, 0, 0, 1))),
            hold=random.random() < 0.1,
            abort_after=self._sometimes(0.12),
            fork_after=self._sometimes(0.12),
            release_after=random.exponential(2.0),
        )

    def fork_token(self) -> int | None:
        """What the last token of a fork is replaced by; None keeps it."""
        if self._random.random() < 0.5:
            return None
        return int(self._random.integers(self._vocab_size))

    def _prompt(self) -> tuple[int, ...]:
        random = self._random
        kind = random.random()
        own = self._tokens(1 + int(random.exponential(self.context_tokens / 20)))
        if kind < 0.5:
            return (*self.prefixes[random.integers(len(self.prefixes))], *own)
        if kind < 0.75 and self._conversations:
            earlier = self._conversations[random.integers(len(self._conversations))]
            earlier = earlier[: self.context_tokens // 2]
            return earlier if kind < 0.6 else (*earlier, *own)
        return self._tokens(1 + int(random.integers(self.context_tokens // 3)))

    def _params(self) -> SamplingParams:
        random = self._random
        options: dict[str, Any] = {}
        if random.random() < 0.4:
            options |= {"temperature": random.uniform(0.2, 1.5), "seed": random.integers(2**31)}
            if random.random() < 0.5:
                options |= {"top_p": random.uniform(0.5, 1.0), "top_k": random.integers(50)}
            if random.random() < 0.2:
                options["min_p"] = random.uniform(0.0, 0.2)
        if random.random() < 0.15:
            options |= {"repetition_penalty": 1.2, "frequency_penalty": random.uniform(-0.5, 1.0)}
        if random.random() < 0.05:
            options["logit_bias"] = dict.fromkeys(self._tokens(3), -2.0)
        if random.random() < 0.2:
            options["logprobs"] = random.integers(6)
        if random.random() < 0.25:
            options["stop_token_ids"] = self._tokens(4)
        if self._stop_strings and random.random() < 0.2:
            options["stop"] = str(random.choice(("the", "e", "\n", " in")))
        if random.random() < 0.08:
            options["n"] = random.integers(2, 5)
        mean, most = self.context_tokens // 12, self.context_tokens // 2
        if random.random() < 0.1:
            mean = most
        return SamplingParams(1 + min(int(random.exponential(mean)), most - 1), **options)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.integers(self._vocab_size, size=count).tolist())

    def _sometimes(self, probability: float) -> float | None:
        """A time to wait, or None."""
        return float(self._random.exponential()) if self._random.random() < probability else None


class Arrivals:
    """How many requests come: a Poisson process whose rate changes in waves, with bursts.

    Args:
      capacity: requests that the engine serves in a second.
      wave_seconds: how long a rate lasts on average.
      burst: requests that come at once, at the beginning of one wave in four.
    """

    def __init__(
        self,
        random: np.random.Generator,
        now: float,
        *,
        capacity: float,
        wave_seconds: float,
        burst: int,
    ):
        self._random = random
        self._capacity = capacity
        self._wave_seconds = wave_seconds
        self._burst = burst
        self._wave_ends = now
        self._level = 0.0
        self.next_time = math.inf

    def due(self, now: float) -> int:
        """Requests that have come since the last call."""
        count = 0
        while now >= self._wave_ends:
            self._level = float(self._random.choice(LEVELS))
            self._wave_ends = max(self._wave_ends, now - self._wave_seconds)
            self._wave_ends += self._wave_seconds * self._random.uniform(0.3, 1.7)
            self.next_time = now + self._wait()
            count += self._burst * (self._random.random() < 0.25)
        while now >= self.next_time:
            count += 1
            self.next_time += self._wait()
        return count

    @property
    def next_change(self) -> float:
        """When something may happen next."""
        return min(self.next_time, self._wave_ends)

    def _wait(self) -> float:
        rate = self._level * self._capacity
        return self._random.exponential(1 / rate) if rate else math.inf
