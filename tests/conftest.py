"""What holds for every test: no silent promotion of rank or dtype, shapes checked, and programs
compiled once for all processes of a run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

from tests import typechecking

pytest_plugins = ["tests.devices", "tests.effort", "tests.fixtures_weights", "tests.interpreted"]

settings.register_profile("long")  # tests that can go on for longer ask for its name

install_import_hook(
    [
        "pallas_kernels",
        "jax_chunkattn.device",
        "jax_chunkattn.planning",
        *(
            f"jax_chunkattn.sampling.{module}"  # `params` itself checks and converts its numbers
            for module in ("log_probabilities", "rows", "sampler", "seeds")
        ),
    ],
    f"{typechecking.__name__}.{typechecking.typechecker.__name__}",
)
# Nearly all of the tests' time is XLA compiling, and the processes of one run, and those that tests
# start, need many programs in common. Nothing is kept for the next run, but where several runs have
# a folder in common: JAX finds a program by all that it is made from, its own version among it.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_COMMON = os.environ.get("JAX_CHUNKATTN_TESTS_PROGRAMS")
if not _IS_WORKER:
    folder = _COMMON or tempfile.mkdtemp(prefix="jax_chunkattn-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
else:
    os.environ.pop("COLUMNS", None)  # the width of the terminal above, where these write to none
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types are not checked: for tests of how the code itself refuses what they forbid."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """JAX as it is where nobody has told it to keep compiled programs."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    for chosen in (None, folder):
        jax.config.update("jax_compilation_cache_dir", chosen)
        reset_cache()
        if chosen is None:
            yield


def pytest_unconfigure() -> None:
    if not _IS_WORKER and not _COMMON:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gc-threshold",
        type=int,
        metavar="N",
        help="collect garbage after N allocations while a test runs: 1 has finalisers run anywhere",
    )


def pytest_collection_finish() -> None:
    """What is imported and collected stays: to look for garbage in it again and again would take a
    tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(item.config.getoption("--gc-threshold") or before[0], *before[1:])
    try:
        return (yield)
    finally:
        gc.set_threshold(*before)


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
