"""The driving loop: one thread submits what is due, advances the engine, and notes the times."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.harness.interrupts import deferred_interrupts
from experiments.serve.workload import ServedRequest
from jax_chunkattn import Engine, EngineStats, RequestHandle, SamplingParams, StreamEvent

LONGEST_SLEEP = 0.05  # seconds between two looks at whether the user wants to stop


@dataclass(frozen=True)
class Served:
    """One request, in seconds after the replay began.

    Attributes:
      arrival: when it was due; in a closed loop, when it was submitted.
      hit_tokens: prompt tokens found in the cache; None when others were admitted in the same turn,
        since the engine counts for all of them together.
      tokens: the answer.
    """

    index: int
    arrival: float
    first_token: float
    end: float
    prompt_tokens: int
    hit_tokens: int | None
    tokens: tuple[int, ...]

    @property
    def time_to_first_token(self) -> float:
        return self.first_token - self.arrival

    @property
    def seconds_per_output_token(self) -> float | None:
        """After the first one; None for an answer of one token."""
        rest = len(self.tokens) - 1
        return (self.end - self.first_token) / rest if rest else None

    @property
    def normalised_latency(self) -> float:
        """Seconds from arrival to end, per output token."""
        return (self.end - self.arrival) / len(self.tokens)


@dataclass(frozen=True)
class Replayed:
    """All requests in the order of arrival, and the most that ran or waited after any turn."""

    served: tuple[Served, ...]
    most_running: int
    most_waiting: int
    stats: EngineStats


def _ignore(*_: object) -> None:
    pass


def replay(
    engine: Engine,
    requests: Sequence[ServedRequest],
    *,
    at_once: int | None = None,
    for_seconds: float = math.inf,
    on_served: Callable[[Served], None] = _ignore,
    on_turn: Callable[[int], None] = _ignore,
) -> Replayed:
    """Serve the requests to their ends, `at_once` of them under way, or each when it is due.

    After `for_seconds` what is not served is left as it is.
    `on_served` gets each request when it has ended; `on_turn` gets how many have, after every turn.

    Raises:
        RequestFailed: an error ended a request.
        KeyboardInterrupt: between two turns.
    """
    driver = _Driver(engine, requests, at_once, on_served)
    with deferred_interrupts() as check_interrupt:
        while driver.unfinished and driver.now() < for_seconds:
            driver.turn()
            on_turn(len(driver.served))
            check_interrupt()
    return driver.replayed()


class _Driver:
    """Times are of a clock that stands still while the engine compiles.

    In a turn the engine compiles what it dispatches before it takes over results, so all events of
    a turn come after what was compiled in it.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[ServedRequest],
        at_once: int | None,
        on_served: Callable[[Served], None],
    ) -> None:
        self.served: list[Served] = []
        self._engine = engine
        self._requests = requests
        self._at_once = at_once
        self._on_served = on_served
        self._pending = deque(enumerate(requests))
        self._handles: dict[int, RequestHandle] = {}
        self._arrivals: dict[int, float] = {}
        self._first_tokens: dict[int, float] = {}
        self._events: list[tuple[int, float, StreamEvent]] = []
        self._hits = _HitsByRequest()
        self._most_running = self._most_waiting = 0
        self._compiled = engine.stats.compile_seconds
        self._began = time.perf_counter() - self._compiled

    @property
    def unfinished(self) -> bool:
        return len(self.served) < len(self._requests)

    def turn(self) -> None:
        """Submits what is due, then advances the engine, or waits for the next to come."""
        self._submit_due()
        if not self._engine.has_work:
            until_due = self._pending[0][1].due - self.now()
            time.sleep(min(max(until_due, 0.0), LONGEST_SLEEP))
            return
        self._engine.step()
        stats = self._engine.stats
        self._compiled = stats.compile_seconds
        self._most_running = max(self._most_running, stats.running)
        self._most_waiting = max(self._most_waiting, stats.waiting)
        self._hits.note(stats)
        self._take_events()
        if stats.failed:
            for handle in self._handles.values():
                if handle.done:
                    handle.result()  # raises what ended it

    def replayed(self) -> Replayed:
        served = tuple(sorted(self.served, key=lambda one: one.index))
        return Replayed(served, self._most_running, self._most_waiting, self._engine.stats)

    def now(self) -> float:
        """Seconds since the replay began."""
        return time.perf_counter() - self._began - self._compiled

    def _submit_due(self) -> None:
        now = self.now()
        while self._pending:
            index, request = self._pending[0]
            if self._at_once is None:
                arrival = request.due
                if arrival > now:
                    return
            else:
                arrival = now
                if len(self._handles) >= self._at_once:
                    return
            self._pending.popleft()
            self._submit(index, request, arrival)

    def _submit(self, index: int, request: ServedRequest, arrival: float) -> None:
        events = self._events  # not self: the engine would refer to us, and we to it
        self._arrivals[index] = arrival
        self._hits.submitted(index, len(request.prompt))
        self._handles[index] = self._engine.submit(
            request.prompt,
            SamplingParams(max_tokens=request.output_tokens, ignore_eos=True),
            on_event=lambda event: events.append((index, time.perf_counter(), event)),
        )

    def _take_events(self) -> None:
        for index, instant, event in self._events:
            now = instant - self._began - self._compiled
            self._first_tokens.setdefault(index, now)
            if event.finish_reason is not None:
                self._finish(index, now)
        self._events.clear()

    def _finish(self, index: int, end: float) -> None:
        request = self._requests[index]
        served = Served(
            index,
            self._arrivals.pop(index),
            self._first_tokens.pop(index),
            end,
            len(request.prompt),
            self._hits.of(index),
            self._handles.pop(index).tokens,
        )
        self.served.append(served)
        self._on_served(served)


class _HitsByRequest:
    """Which request had how many of its tokens found, told from the engine's sums.

    Requests are admitted in the order they are submitted, and counted then, with all their tokens.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[int, int]] = deque()
        self._counted = self._found = 0
        self._hits: dict[int, int | None] = {}

    def submitted(self, index: int, prompt_tokens: int) -> None:
        self._queue.append((index, prompt_tokens))

    def note(self, stats: EngineStats) -> None:
        """Takes over what a turn has added."""
        use = stats.prompts
        found = use.num_found
        admitted = []
        while self._counted < use.num_tokens:
            index, prompt_tokens = self._queue.popleft()
            self._counted += prompt_tokens
            admitted.append(index)
        new, self._found = found - self._found, found
        known = len(admitted) == 1 or not new
        self._hits.update((index, new if known else None) for index in admitted)

    def of(self, index: int) -> int | None:
        return self._hits.pop(index)
