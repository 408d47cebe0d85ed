"""Telling requests' callbacks what is new."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from jax_chunkattn.engine.requests import Request


class Callbacks:
    """Keeps what is new until the state is whole, then tells it in its order.

    A callback may call the engine; what it takes over there is told in its turn.

    Attributes:
      running: a callback runs, and may call the engine.
      depth: callbacks that run, one called by what another one has called.
    """

    def __init__(self) -> None:
        self.running = False
        self.depth = 0
        self._news: deque[Request] = deque()

    def __len__(self) -> int:
        """Requests that have news; one may be counted several times."""
        return len(self._news)

    def note(self, request: Request) -> None:
        """There is, or will be, something new."""
        if request.on_event is not None:
            self._news.append(request)

    def tell(self, fail: Callable[[Request, BaseException], None]) -> None:
        """Calls back about all that is new; a callback that raises has its own request fail."""
        while self._news:
            request = self._news[0]
            self._tell(request, fail)
            if self._news and self._news[0] is request:  # else a callback has seen to it
                self._news.popleft()

    def _tell(self, request: Request, fail: Callable[[Request, BaseException], None]) -> None:
        while request.on_event is not None and (event := request.untold) is not None:
            failure = None
            outer, self.running = self.running, True
            depth, self.depth = self.depth, self.depth + 1
            try:
                request.num_told += 1
                request.on_event(event)
            except Exception as error:
                failure = error
            finally:
                self.running, self.depth = outer, depth
            if failure is not None:
                request.on_event, request.error = None, failure
                fail(request, failure)
