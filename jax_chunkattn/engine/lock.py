"""The engine's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class FairLock:
    """Runs one thread's work at a time, in the order in which the threads came.

    A thread that gives up a `threading.RLock` and takes it again at once, as one does that advances
    the engine step by step, mostly finds it free: those who waited have been woken, but come too
    late, time and again. Here each thread waits for the one that came before it.

    Exclusion is an RLock's; the order is kept beside it and decides nothing else. All locks are
    taken by `with` on the interpreter's own locks, which no signal can tear apart: the handler of
    a signal, Ctrl-C say, runs between two bytecodes, and neither lies between taking such a lock
    and being bound to release it. Only between the two could a context manager written in Python
    be interrupted. A thread that waits or works here and comes again, by a callback or a handler,
    never waits for itself.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tickets: dict[int, threading.Lock] = {}  # held by threads that wait or work
        self._worker: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread is at work."""
        return self._worker == threading.get_ident()

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, run while no other thread is at work."""
        thread = threading.get_ident()
        if self._worker == thread:
            return work()
        if thread in self._tickets:  # it waits, and a handler has interrupted it
            return self._work(thread, work)
        ticket = threading.Lock()
        with ticket:
            before = list(self._tickets.values())[-1:]
            try:
                self._tickets[thread] = ticket
                for predecessor in before:
                    with predecessor:
                        pass
                return self._work(thread, work)
            finally:
                self._tickets.pop(thread, None)

    def _work(self, thread: int, work: Callable[[], Result]) -> Result:
        with self._lock:
            try:
                self._worker = thread
                return work()
            finally:
                self._worker = None
