"""Where a run took place: device, versions, commit, memory.

JAX is imported inside the functions that need it, so that checks of the user's input come first.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax-chunkattn", "jax", "jaxlib", "flax", "numpy")
_STATM = Path("/proc/self/statm")


def describe_environment() -> dict[str, Any]:
    """Device, host, versions, commit and command of this process, as JSON values."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        **describe_host(),
    }


def describe_deviceless() -> dict[str, Any]:
    """The environment of a run that uses no device, and no JAX."""
    return {"device": None, "device_count": 0, **describe_host()}


def describe_host() -> dict[str, Any]:
    """The part of `describe_environment` that holds without a device, and needs no JAX."""
    return {
        "cpu_count": usable_cpus(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "commit": git_commit(),
        "command": ["python", "-m", "experiments", *sys.argv[1:]],
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions of what the numbers depend on; None for what is not installed."""
    return {name: package_version(name) for name in _PACKAGES}


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit this code is at, with `+` when tracked files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "experiments/harness/environment.py")
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def usable_cpus() -> int:
    """The number of CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def max_rss_bytes() -> int:
    """The most memory this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """The memory this process holds resident now, where the system tells."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def free_memory_bytes() -> int | None:
    """Memory that could be taken without swapping, where the system tells."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
