"""Driving an engine through a soak: requests are started, forked, given up and released in time."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from experiments.soak.account import Account, Tracked
from experiments.soak.work import Workload
from jax_chunkattn import Engine, InvalidRequest, PinnedPrefix, PoolExhausted, RequestHandle

MAX_BACKLOG = 10  # requests that wait for each row; no more come above that
MOST_PINS = 2
LONGEST_SLEEP = 0.02


class Driver:
    """Brings work to the engine and advances it; all that is random comes from `random`.

    Attributes:
      refused: requests that found no room beside what is pinned, forks and pins that came too late
        or found none.
      request_seconds: how long a request takes, more or less: the unit of an arrival's times.
    """

    def __init__(
        self,
        engine: Engine,
        work: Workload,
        account: Account,
        random: np.random.Generator,
        *,
        rows: int,
    ):
        self.refused = 0
        self.request_seconds = 0.1
        self._engine = engine
        self._work = work
        self._account = account
        self._random = random
        self._rows = rows
        self._pins: list[PinnedPrefix] = []
        self._held: dict[RequestHandle, None] = {}
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def submit(self) -> None:
        """Starts the next request of the workload, unless too many wait."""
        if len(self._account.live) > MAX_BACKLOG * self._rows:
            return
        arrival = self._work.next()
        options: dict[str, Any] = {"salt": arrival.salt, "priority": arrival.priority}
        try:
            if arrival.params.n > 1:
                handles = self._engine.submit_samples(arrival.prompt, arrival.params, **options)
            else:
                options["hold"] = arrival.hold
                handles = [self._engine.submit(arrival.prompt, arrival.params, **options)]
        except PoolExhausted:
            self.refused += 1
            return
        for handle in handles:
            tracked = Tracked(handle, release_after=arrival.release_after)
            self._account.start(tracked)
            if arrival.abort_after is not None:
                self._plan(arrival.abort_after, partial(_abort, tracked))
            if arrival.fork_after is not None:
                self._plan(arrival.fork_after, partial(self._fork, tracked))

    def pin_sometimes(self) -> None:
        """Pins a prefix of the workload, or releases one."""
        if len(self._pins) == MOST_PINS:
            self._pins.pop(0).release()
            return
        prefix = self._work.prefixes[self._random.integers(len(self._work.prefixes) - 1)]
        try:
            self._pins.append(self._engine.pin(prefix))
        except (InvalidRequest, PoolExhausted):  # shorter than a chunk, or no room beside requests
            self.refused += 1

    def renew_weights(self) -> None:
        """Serves the same weights as if they were new, now and then when all who run have ended."""
        running = "finish" if self._random.random() < 0.25 else "recompute"
        self._engine.update_weights(self._engine.weights, running=running)

    def turn(self, wake_at: float) -> None:
        """Does what is planned and due, then advances the engine, or sleeps when it is idle."""
        now = time.perf_counter()
        while self._planned and self._planned[0][0] <= now:
            heapq.heappop(self._planned)[-1]()
        if self._engine.has_work:
            self._engine.step()
        else:
            planned = self._planned[0][0] if self._planned else wake_at
            time.sleep(max(0.0, min(wake_at - now, planned - now, LONGEST_SLEEP)))
        for tracked in self._account.collect():
            handle = tracked.handle
            if handle.finish_reason in ("stop", "length"):
                self._work.remember(handle.prompt, handle.tokens)
            self._held[handle] = None
            self._plan(tracked.release_after, partial(self._release, tracked))

    def let_go(self) -> None:
        """Gives up what is planned, held and pinned."""
        self._planned.clear()
        for handle in self._held:
            handle.release()
        for pin in self._pins:
            pin.release()
        self._held.clear()
        self._pins.clear()

    def _release(self, tracked: Tracked) -> None:
        """Some that were kept are forked first."""
        if self._random.random() < 0.3:
            self._fork(tracked)
        tracked.handle.release()
        self._held.pop(tracked.handle, None)

    def _fork(self, tracked: Tracked) -> None:
        """Goes on from where a request stands; from its end for a few tokens more."""
        parent = tracked.handle
        token, params = self._work.fork_token(), parent.params
        if parent.done:
            if parent.finish_reason == "stop":
                token = token or 0
            room = self._work.context_tokens - len(parent.prompt)
            most = len(parent.tokens) + 1 + int(self._random.integers(8))
            params = replace(params, max_tokens=min(most, room))
        try:
            handle = parent.fork(params, next_token=token)
        except (InvalidRequest, PoolExhausted):  # it has no token to replace, or none to add
            self.refused += 1
            return
        rechecks = tracked.rechecks and token is None
        self._account.start(Tracked(handle, begun_with=len(handle.tokens), rechecks=rechecks))

    def _plan(self, after: float, action: Callable[[], None]) -> None:
        when = time.perf_counter() + after * self.request_seconds
        heapq.heappush(self._planned, (when, next(self._numbers), action))


def _abort(tracked: Tracked) -> None:
    tracked.aborted = True
    tracked.handle.abort()
