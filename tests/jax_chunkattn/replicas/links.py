"""Replicas in this process, which can be lost at any exchange."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from jax_chunkattn import Engine, KVEvents
from jax_chunkattn.replicas.front_end import ReplicaLost
from jax_chunkattn.replicas.server import Order, ReplicaServer, Report
from tests.jax_chunkattn.engine.engines import make_engine

CHUNK = 16  # of these engines


def toy_engine(events: KVEvents) -> Engine:
    return make_engine(kv_events=events)


class LocalLink:
    """A server that is called as it is. When `dies` says so, what an exchange has done is lost."""

    def __init__(self, dies: Callable[[], bool] = lambda: False, make=toy_engine):
        self._server = ReplicaServer(make)
        self._dies = dies
        self.closed = False
        self._server.start()

    def exchange(self, orders: Sequence[Order], aborts: Sequence[int]) -> Report:
        if self.closed:
            raise ReplicaLost("closed")
        report = self._server.exchange(orders, aborts)
        if self.closed or self._dies():
            raise ReplicaLost("killed")
        return report

    def close(self) -> None:
        self.closed = True


def every(number: int, most: int) -> Callable[[], bool]:
    """Says yes at every so many calls, so many times."""
    calls = itertools.count(1)
    return lambda: (now := next(calls)) % number == 0 and now <= number * most
