"""How hard tests try: XLA when it compiles for the CPU, and hypothesis.

Most of the tests' time is XLA making machine code, and most tests ask what a program computes and
not how well. So XLA emits the plainest code for them, and where it still has its older emitters
(jaxlib 0.10.2; 0.12 has not) by those. It is as users get it in tests marked `optimised`, whose
subject is rounding or the program itself; in all with `--optimise`; and in the processes that tests
start, but for those that get `xla_flags()`. Code for GPUs is never touched.

`--hypothesis-profile=long` has hypothesis make up more examples.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from hypothesis import settings
from jax._src import compiler  # no public option holds for all that is compiled

from jax_chunkattn.device.programs import Invocation

_PLAIN = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,  # pieces that are compiled at once cost more in all
}
_OLDER: dict[str, str | bool] = {"xla_cpu_use_fusion_emitters": False}
_plain = False

_get_compile_options = compiler.get_compile_options
_key = Invocation.key


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimise", action="store_true", help="compile all as users get it")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _plain
    options = item.config.option
    always = options.optimise or getattr(options, "write", False)
    _plain_options()  # not within a test that counts what is compiled
    _plain = not always and item.get_closest_marker("optimised") is None


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """What is compiled within is as users get it: what an error is measured against, say."""
    global _plain
    before, _plain = _plain, False
    try:
        yield
    finally:
        _plain = before


def xla_flags() -> str:
    """What has another process compile as this test does, in its `XLA_FLAGS`."""
    options = _plain_options() if _plain else {}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


def examples(everyday: int, long: int) -> int:
    """How many hypothesis makes up, or seconds that chance gets."""
    return long if settings.get_current_profile_name() == "long" else everyday


def _options_by_effort(
    *args: Any,
    env_options_overrides: dict[str, Any] | None = None,
    backend: Any = None,
    **kwargs: Any,
) -> Any:
    if _plain and backend is not None and backend.platform == "cpu":
        env_options_overrides = _plain_options() | (env_options_overrides or {})
    return _get_compile_options(
        *args, env_options_overrides=env_options_overrides, backend=backend, **kwargs
    )


@functools.cache
def _plain_options() -> dict[str, Any]:
    with optimised():
        trivial = jax.jit(lambda: 0).lower()
        try:
            trivial.compile(_OLDER)
        except jax.errors.JaxRuntimeError:  # no such option
            return _PLAIN
    return _PLAIN | _OLDER


# Engines share their programs: an optimised test gets none that was compiled for another.
Invocation.key = lambda self: (_plain, _key(self))
compiler.get_compile_options = _options_by_effort
