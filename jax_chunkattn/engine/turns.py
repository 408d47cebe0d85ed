"""Whose turn it is at the core, and what waits for the next turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from jax_chunkattn.engine.core import Core
from jax_chunkattn.engine.lock import FairLock
from jax_chunkattn.engine.requests import Reader, Request

Result = TypeVar("Result")


class Turns:
    """Lets one thread at a time use the core, and repairs what Ctrl-C has broken off before the
    next may.

    A signal's handler and a finaliser run between two bytecodes of whatever their thread does,
    which may be a turn, or waiting for one, or holding a lock of the user's that a callback wants.
    So a finaliser only leaves word for the next turn, and a handler that has interrupted a turn can
    do no more.
    """

    def __init__(self, core: Core):
        self._core = core
        self._lock = FairLock()
        self._left: deque[Callable[[], None]] = deque()
        self._dropped: deque[Reader] = deque()

    @property
    def interrupted(self) -> bool:
        """Whether this thread is in a turn, and not in a callback: a handler or finaliser asks."""
        return self._lock.is_mine and not self._core.callbacks.running

    @property
    def has_left(self) -> bool:
        """Whether something waits for the next turn."""
        return bool(self._left or self._dropped)

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, run in a turn, or in the one from which a callback calls.

        Raises:
          RuntimeError: in a handler or finaliser that has interrupted a turn.
        """
        self.refuse_handlers()
        return self._lock.run(partial(self._turn, work))

    def run_or_undo(self, work: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """As `run`; if Ctrl-C keeps the result from the caller, `undo` leaves word for the next
        turn. An ordinary error leaves nothing to undo."""
        try:
            return self.run(work)
        except Exception:
            raise
        except BaseException:
            undo()
            raise

    def refuse_handlers(self) -> None:
        """Raises RuntimeError in a handler or finaliser that has interrupted a turn."""
        if self.interrupted:
            raise RuntimeError(
                "the engine was called by a signal's handler or a finaliser that interrupted it at "
                "work: only stats, close, abort, release and prune can be used there"
            )

    def change(self, change: Callable[[], None]) -> None:
        """Makes a change in a turn, the next one if a handler has interrupted this one.

        A change made twice must be as good as made once.
        """
        if self.interrupted:
            self.leave(change)
        else:
            self.run(change)

    def see_through(self, change: Callable[[], None]) -> None:
        """As `change`; if Ctrl-C breaks it off, the next turn makes it, whoever's that is."""
        self.leave(change)
        if not self.interrupted:
            self.run(lambda: None)

    def leave(self, change: Callable[[], None]) -> None:
        """Leaves a change for the next turn. Takes no lock and waits for nothing."""
        self._left.append(change)

    def reader(self, iteration: object, requests: tuple[Request, ...]) -> Reader:
        """Has the requests aborted by the next turn after the iteration over them has died."""
        return Reader(iteration, self._dropped.append, requests)

    def drop(self, reader: Reader) -> None:
        """As if its iteration had died."""
        self._dropped.append(reader)
        reader.left = True

    def _turn(self, work: Callable[[], Result]) -> Result:
        core, callbacks = self._core, self._core.callbacks
        calling_back, callbacks.running = callbacks.running, False
        try:
            core.mend()
            while self._dropped:
                self._abort(self._dropped[0])
            while self._left:
                self._make(self._left[0])
            return work()
        finally:
            callbacks.running = calling_back

    # A change is taken away only when it is made, so that Ctrl-C cannot lose it; the turn of a
    # callback may have made it already.

    def _abort(self, reader: Reader) -> None:
        for request in reader.requests:
            self._core.abort(request)
        reader.end()
        if reader in self._dropped:
            self._dropped.remove(reader)

    def _make(self, change: Callable[[], None]) -> None:
        try:
            change()
        except Exception:
            self._take_away(change)
            raise
        self._take_away(change)

    def _take_away(self, change: Callable[[], None]) -> None:
        if change in self._left:
            self._left.remove(change)
