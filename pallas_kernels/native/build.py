"""Compiles the kernel's sources with the system's compiler, once for each machine.

The library is kept in the user's cache, by all that decides what it is: the sources, the compiler,
its options, the processor that it is for, and the headers that jaxlib ships.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as version_of
from pathlib import Path

import jax

from pallas_kernels.cache_folder import cache_dir

try:
    import fcntl
except ImportError:
    fcntl = None

SOURCES = Path(__file__).parent
MAIN = "bindings.cc"
COMPILERS = ("g++", "clang++", "c++")
"""Tried in this order, unless `$CXX` names one."""
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-pthread",
)
TIME_LIMIT = 300
"""Seconds."""

log = logging.getLogger(__name__)


class BuildError(Exception):
    """The kernel could not be compiled here; the message says why, in a line."""


@functools.cache
def sources_digest() -> str:
    """A name for what the sources say."""
    return _digest(*(path.read_bytes() for path in _source_files()))


def build() -> Path:
    """The compiled library.

    Raises:
      BuildError: when there is no compiler, it fails, or the library cannot be written.
    """
    compiler = find_compiler()
    command = [compiler, *OPTIONS, *_for_this_processor(), f"-I{jax.ffi.include_dir()}"]
    version = _run([compiler, "--version"]).splitlines()[0]
    key = _digest(sources_digest(), *command, version, _processor(), version_of("jaxlib"))
    library = cache_dir() / "native" / f"{key}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(library.with_suffix(".lock")):
            if not library.exists():
                _compile(command, library)
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be written: {error.strerror}") from error
    return library


def _compile(command: list[str], library: Path) -> None:
    began = time.perf_counter()
    # Whoever finds a library under its name finds all of it.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        _run([*command, str(SOURCES / MAIN), "-o", str(unfinished)])
        unfinished.replace(library)
    log.info("compiled attention for this processor in %.1f s", time.perf_counter() - began)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Processes that want the same library at once wait for the first, where the system can."""
    with path.open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_compiler() -> str:
    """The C++ compiler to use.

    Raises:
      BuildError: when there is none.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        if found := shutil.which(name):
            return found
    if chosen:
        raise BuildError(f"there is no compiler {chosen!r}, which $CXX names")
    raise BuildError(f"there is no C++ compiler: none of {', '.join(COMPILERS)}")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        why = errors[0] if errors else f"status {done.returncode}"
        raise BuildError(f"{command[0]} failed: {why.strip()}")
    return done.stdout


def _for_this_processor() -> tuple[str, ...]:
    # On ARM -march=native leaves the choice of instructions' costs to -mcpu.
    return ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.startswith(names))


def _source_files() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cc"))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]
