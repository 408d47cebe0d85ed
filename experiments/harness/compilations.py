"""Counting what XLA compiles, through the events that JAX reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_OBTAINED = "/jax/core/compile/backend_compile_duration"
_FROM_CACHE = "/jax/compilation_cache/cache_hits"


@dataclass
class Compilations:
    """Programs obtained while counting.

    Attributes:
        compiled: programs that XLA compiled.
        from_cache: programs that the persistent compilation cache already had.
        seconds: time spent on both; tracing and lowering are not in it.
    """

    compiled: int = 0
    from_cache: int = 0
    seconds: float = 0.0


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Count the programs this process compiles, or loads from the cache, inside the block."""
    from jax import monitoring

    counts = Compilations()

    # The duration event covers every program, whether compiled or loaded; a load also reports a
    # cache hit just before it.
    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _OBTAINED:
            counts.compiled += 1
            counts.seconds += duration_secs

    def on_event(event: str, **kwargs: str | int) -> None:
        if event == _FROM_CACHE:
            counts.compiled -= 1
            counts.from_cache += 1

    monitoring.register_event_duration_secs_listener(on_duration)
    monitoring.register_event_listener(on_event)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(on_duration)
        monitoring.unregister_event_listener(on_event)
