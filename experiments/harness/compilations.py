"""What XLA compiles: kept from one run to the next, and counted through the events of JAX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.harness.errors import UserError
from experiments.harness.json_text import is_half_a_pair

_OBTAINED = "/jax/core/compile/backend_compile_duration"
_FROM_CACHE = "/jax/compilation_cache/cache_hits"


@contextmanager
def compilation_cache(folder: Path | None = None) -> Iterator[None]:
    """Keep every program compiled inside, a block or a decorated function, on disk.

    In `folder`, else in the project's cache; or where the user chose to, through JAX's own setting.
    JAX's settings are left as they were.

    Raises:
        UserError: the project's cache is at a path that is no text, which JAX does not take.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    from jax_chunkattn.device.compilation_cache import (
        FOLDER_SETTING,
        KEEP_ALL,
        use_compilation_cache,
    )
    from pallas_kernels.cache_folder import CACHE_VARIABLE, cache_dir

    before = {name: jax.config.values[name] for name in (FOLDER_SETTING, *KEEP_ALL)}
    wanted = before[FOLDER_SETTING] or folder or cache_dir() / "jax"
    if is_half_a_pair(str(wanted)):
        raise UserError(
            f"the cache folder {str(wanted)!a} is no text in UTF-8, which JAX needs; choose "
            f"another with {CACHE_VARIABLE}"
        )
    use_compilation_cache(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


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
