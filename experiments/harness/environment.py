"""Where a run took place: device, versions, commit, memory.

JAX is imported inside the functions that need it, so that checks of the user's input come first.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax-chunkattn", "jax", "jaxlib", "flax", "numpy", "tokenizers", "jinja2")
_SETTINGS = ("JAX_", "XLA_", "NVIDIA_TF32_OVERRIDE", "NPROC", "OMP_NUM_THREADS")
_NO_SETTINGS = (  # of where things are kept, what is shown, and which device, which is told itself
    "JAX_CHUNKATTN_",
    "JAX_COMPILATION_CACHE",
    "JAX_LOGGING_LEVEL",
    "JAX_PERSISTENT_CACHE",
    "JAX_PLATFORMS",
    "JAX_TRACEBACK_FILTERING",
    "XLA_PYTHON_CLIENT_",
)
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
        "settings": settings(),
        "commit": git_commit(),
        "command": ["python", "-m", "experiments", *sys.argv[1:]],
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions of what the numbers depend on; None for what is not installed."""
    return {name: package_version(name) for name in _PACKAGES}


def settings() -> dict[str, str]:
    """Environment variables that change what JAX computes, and on how many threads."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SETTINGS) and not name.startswith(_NO_SETTINGS)
    }


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit this code is at; None outside git.

    Where tracked files differ from it, `+` and a digest of how: two states are not taken for one.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            check=True,
            capture_output=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "experiments/harness/environment.py")
        commit = git("rev-parse", "HEAD").decode()
        difference = git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
        return f"{commit}+{hashlib.sha256(difference).hexdigest()[:12]}" if difference else commit
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
