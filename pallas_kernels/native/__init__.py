"""Attention and products compiled for this machine's processor: C++ behind XLA's foreign function
interface."""

from __future__ import annotations

from importlib import import_module

from pallas_kernels.targets import Target

DTYPES = ("float32", "bfloat16", "float16")
"""Of the arrays that the kernel reads."""


def problem_on(target: Target) -> str | None:
    """Why the kernel cannot run on a device, if it cannot. The first call compiles it."""
    if target.platform != "cpu":
        return f"it is for CPUs, and the device is {target.name!r}"
    # Imported when first asked for, as all modules of implementations are.
    return import_module("pallas_kernels.native.library").problem()


def problem_of(dtype: object) -> str | None:
    """Why the kernel cannot read arrays of a dtype, if it cannot."""
    return None if str(dtype) in DTYPES else f"it reads {', '.join(DTYPES)}, not {dtype}"
