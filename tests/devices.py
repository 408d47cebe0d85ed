"""Tests that need several devices, in processes that have them.

A process's CPU is one device to JAX unless it says otherwise before JAX looks, and then XLA makes
other programs of everything. So the tests' own processes have one, and a test marked `devices(n)`
runs in a process of its own that has n: pytest again, for that test alone. In a process that has
enough it runs like any other:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest -n0 tests/jax_chunkattn/device/...
"""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

FLAG = "--xla_force_host_platform_device_count"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("devices")
    if marker is None or jax.device_count() >= marker.args[0]:
        return None
    _run_with(marker.args[0], pyfuncitem)
    return True


def _run_with(devices: int, item: pytest.Function) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={devices}"
    options = [
        *(f"--{name}" for name in ("optimise",) if item.config.getoption(name)),
        *(["--hypothesis-profile", profile] if (profile := _profile(item)) else []),
    ]
    command = [sys.executable, "-m", "pytest", "-n0", "-s", "-m", "", "--durations=0", *options]
    finished = subprocess.run(
        [*command, item.nodeid],
        cwd=item.config.rootpath,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    sys.stdout.write(finished.stdout)
    if finished.returncode:
        pytest.fail(f"with {devices} devices:\n{finished.stdout}{finished.stderr}", pytrace=False)
    if " skipped" in finished.stdout.splitlines()[-1]:
        pytest.skip(f"with {devices} devices: {finished.stdout}")


def _profile(item: pytest.Function) -> str | None:
    return item.config.getoption("--hypothesis-profile", None)
