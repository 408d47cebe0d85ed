"""The engine's lock."""

from __future__ import annotations

import threading


class FairLock:
    """A lock that its owner may take again, and that lets in those who wait for it.

    A thread that gives up a `threading.RLock` and takes it again at once, as one does that advances
    the engine step by step, mostly finds it free: those who waited have been woken, but come too
    late, time and again. Here the way to the lock leads through a gate, which is shut while someone
    behind it waits.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if self._owner != thread:  # nobody else can make it equal
            with self._gate:
                self._lock.acquire()
            self._owner = thread
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
