"""Ctrl-C at a moment when what is there can be kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C wait for a call of the function this yields, or for the block's end.

    A `KeyboardInterrupt` may otherwise come anywhere: between two changes that belong together, or
    in a garbage collection callback, which swallows it. A second Ctrl-C does come at once.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    pending = False

    def remember(*_: object) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    def check() -> None:
        if pending:
            raise KeyboardInterrupt

    if ours:
        signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    check()


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Let a Ctrl-C that came in a garbage collection callback, or a finaliser, come once more.

    Python prints what is raised there and goes on; JAX has such a callback.
    """
    before = sys.unraisablehook
    timers: list[threading.Timer] = []

    def come_again(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            before(unraisable)
            return
        # A moment later: what is raised in this hook is ignored too.
        interrupt = signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        timers.append(threading.Timer(0.05, *interrupt))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = come_again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = before
