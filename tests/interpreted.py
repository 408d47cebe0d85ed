"""The implementations that tests run on a CPU, Pallas kernels in their interpreter."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.targets import A100, H200, use_target

TARGETS = {
    "pallas_triton": dataclasses.replace(A100, interpret=True),
    "pallas_mosaic_gpu": dataclasses.replace(H200, interpret=True),
}

# Mosaic's interpreter takes seconds a program: those kernels have a file and a smaller set.
implementations = pytest.mark.parametrize(
    "implementation", ["reference", "xla", "pallas_triton"], indirect=True
)


@pytest.fixture
def implementation(request):
    """The name of an implementation; within the test there is a device that runs it."""
    if request.param not in TARGETS:
        yield request.param
        return
    with use_target(TARGETS[request.param]):
        yield request.param
