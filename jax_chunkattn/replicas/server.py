"""What runs where a replica is: an engine that is told what to do, and says what has become of it.

All that is to be said between a front end and a replica goes through one call, `exchange`: new
requests and aborts to it; tokens, errors and KV events back. So a round trip is paid once a turn,
for all requests together, and not for each token of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from jax_chunkattn.engine.admission import InvalidRequest
from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.engine.handle import RequestHandle
from jax_chunkattn.engine.outputs import RequestFailed, StreamEvent
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.kv_events import KVEvent, KVEvents

LISTENS_EVERY = 0.1  # seconds

MakeEngine = Callable[[KVEvents], Engine]
"""Makes a replica's engine, which tells these events; called where the replica is."""


@dataclass(frozen=True)
class Order:
    """A request for a replica.

    Attributes:
      key: what the front end knows it by.
      prompt, params, salt: as `Engine.submit` takes them; the seed is given.
      chosen: tokens that replicas before have chosen.
    """

    key: int
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str = ""
    chosen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What has happened at a replica since the last one.

    Attributes:
      events: by request, in order.
      failed: what ended requests that have no last event.
      cache: what its cache has gained and lost.
      found, prompted: prompt tokens that were found there, of so many, since the engine was made.
    """

    events: tuple[tuple[int, StreamEvent], ...] = ()
    failed: tuple[tuple[int, Exception], ...] = ()
    cache: tuple[KVEvent, ...] = ()
    found: int = 0
    prompted: int = 0


@dataclass
class ReplicaServer:
    """An engine behind `exchange`. For one caller at a time.

    Attributes:
      make_engine: called once, by `start`.
    """

    make_engine: MakeEngine
    _cache: KVEvents = field(default_factory=KVEvents, init=False)
    _engine: Engine | None = field(default=None, init=False)
    _handles: dict[int, RequestHandle] = field(default_factory=dict, init=False)
    _events: list[tuple[int, StreamEvent]] = field(default_factory=list, init=False)

    def start(self) -> int:
        """Makes the engine, if it is not there; returns its tokens per chunk."""
        if self._engine is None:
            self._engine = self.make_engine(self._cache)
        return self._engine.cache.chunk_size

    def exchange(self, orders: Sequence[Order] = (), aborts: Sequence[int] = ()) -> Report:
        """Takes orders, and works until there is something to tell, or nothing to do, or others may
        have come: for `LISTENS_EVERY` seconds at most, and one turn at least."""
        self.start()
        assert self._engine is not None
        failed = [(order.key, error) for order in orders if (error := self._submit(order))]
        for key in aborts:
            if key in self._handles:
                self._handles.pop(key).abort()
        until = time.monotonic() + LISTENS_EVERY
        while not (self._events or failed) and self._engine.step():
            failed = self._failures()
            if time.monotonic() > until:
                break
        failed = failed or self._failures()
        told, self._events = self._events, []
        for key, event in told:
            if event.finish_reason is not None:
                self._handles.pop(key, None)
        use = self._engine.stats.prompts
        return Report(
            tuple(told), tuple(failed), tuple(self._cache.take()), use.num_found,
            use.num_tokens,
        )  # fmt: skip

    def _submit(self, order: Order) -> Exception | None:
        assert self._engine is not None
        try:
            self._handles[order.key] = self._engine.submit(
                order.prompt,
                order.params,
                salt=order.salt,
                chosen=order.chosen,
                on_event=partial(self._note, order.key),
            )
        except (InvalidRequest, PoolExhausted) as error:
            return error
        return None

    def _note(self, key: int, event: StreamEvent) -> None:
        self._events.append((key, event))

    def _failures(self) -> list[tuple[int, Exception]]:
        """Requests that errors have ended, which are told of once."""
        ended = [key for key, handle in self._handles.items() if handle.finish_reason == "error"]
        errors = [(key, self._handles.pop(key).error) for key in ended]
        return [(key, RequestFailed(f"the request failed: {error}")) for key, error in errors]
