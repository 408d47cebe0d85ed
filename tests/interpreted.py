"""The implementations that tests run on a CPU, Pallas kernels in their interpreter, and which cases
each of them runs every day."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.implementations import NATIVE
from pallas_kernels.native import library
from pallas_kernels.targets import A100, H200, use_target

TARGETS = {
    "pallas_triton": dataclasses.replace(A100, interpret=True),
    "pallas_mosaic_gpu": dataclasses.replace(H200, interpret=True),
}

# Mosaic's interpreter takes seconds a program: those kernels have a file and a smaller set.
implementations = pytest.mark.parametrize(
    "implementation", ["reference", "xla", "native", "pallas_triton"], indirect=True
)

# The compiled kernel reads no clustered heads.
implementations_of_clusters = pytest.mark.parametrize(
    "implementation", ["reference", "xla", "pallas_triton"], indirect=True
)

# Where rounding counts. What XLA makes of an interpreted kernel nobody runs but these tests.
optimised_implementations = pytest.mark.parametrize(
    "implementation",
    ["reference", pytest.param("xla", marks=pytest.mark.optimised), "native", "pallas_triton"],
    indirect=True,
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A case marked `slow_to_compile` is slow, but for the compiled kernel: the others are compiled
    for each case anew."""
    for item in items:
        if item.get_closest_marker("slow_to_compile") and _implementation_of(item) != NATIVE:
            item.add_marker(pytest.mark.slow)


def _implementation_of(item: pytest.Item) -> object:
    assert isinstance(item, pytest.Function)
    return item.callspec.params.get("implementation")


@pytest.fixture
def implementation(request):
    """The name of an implementation; within the test there is a device that runs it."""
    skip_unless_there(request.param)
    if request.param not in TARGETS:
        yield request.param
        return
    _use_the_interpreter()
    with use_target(TARGETS[request.param]):
        yield request.param


def skip_unless_there(implementation: str) -> None:
    """Skips a test of the compiled kernel where there is no compiler."""
    if implementation == NATIVE and (problem := library.problem()):
        pytest.skip(problem)


@functools.cache
def _use_the_interpreter() -> None:
    """What JAX 0.12's interpreter imports when first used adds to JAX's configuration, and a
    program that was traced before is then traced anew."""

    def store_one(ref):
        ref[...] = jnp.ones_like(ref)

    pl.pallas_call(store_one, jax.ShapeDtypeStruct((8,), jnp.float32), interpret=True)()
