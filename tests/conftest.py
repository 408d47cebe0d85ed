"""Strictness that holds for every test: no silent promotion of rank or dtype, shapes checked."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

pytest_plugins = ["tests.fixtures_weights", "tests.interpreted"]

settings.register_profile("long")  # tests that can go on for longer ask for its name

install_import_hook(
    [
        "pallas_kernels.chunk_attention.api",
        "pallas_kernels.kv_write",
        "pallas_kernels.prefill_attention.api",
    ],
    "beartype.beartype",
)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started this in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 25_000  # of the 65,530 that Linux allows; the engine's programs need as many more


@pytest.fixture(autouse=True, scope="module")
def _room_for_more_programs() -> Iterator[None]:
    """Forgets what JAX has compiled before the process has too many memory maps, and dies."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
