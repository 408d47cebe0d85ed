"""What `doctor` finds out."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.harness.environment import describe_host, free_memory_bytes

IMPLEMENTATIONS = ("pallas_mosaic_gpu", "pallas_triton", "native", "xla", "reference")
EXTRAS: dict[str, tuple[str, ...]] = {
    "experiments": ("tyro", "rich", "matplotlib", "tokenizers", "jinja2"),
    "server": ("starlette", "uvicorn", "pydantic", "prometheus_client"),
    "test": ("pytest", "hypothesis", "chex"),
    "parity": ("torch", "transformers"),
    "cuda12": ("jax-cuda12-plugin",),
    "cuda13": ("jax-cuda13-plugin",),
    "gpu-check": ("nvidia-cuda-nvcc",),
}
"""Packages that tell whether an extra of this project is installed."""


def examine() -> dict[str, Any]:
    """Everything, as JSON values."""
    devices, problems = _devices()
    summary = {
        "experiment": "doctor",
        **describe_host(),
        "devices": devices,
        "problems": problems,
        "implementations": _implementations() if devices else {},
        "memory_free_bytes": free_memory_bytes(),
        "memory_total_bytes": _total_memory(),
        "extras": {name: _missing(packages) for name, packages in EXTRAS.items()},
        "cache": _cache(),
    }
    return summary | {"next": next_command(summary)}


def next_command(summary: dict[str, Any]) -> tuple[str, str]:
    """What to type now, and why."""
    if not summary["devices"]:
        return "pip install --upgrade jax", "JAX finds no device, not even the CPU"
    if missing := summary["extras"]["experiments"]:
        return "pip install -e '.[experiments]'", f"not installed: {', '.join(missing)}"
    if any(device["platform"] == "gpu" for device in summary["devices"]):
        return "python -m experiments gpu", "there is a GPU: check and time every kernel on it"
    if summary["cache"]["smollm2"] is None:
        return "python -m experiments generate", "fetches a small model (98 MB) and runs it"
    return "python -m experiments generate", "the small model is here: nothing is fetched"


def _devices() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What JAX sees, and its words on the platforms it does not offer."""
    import jax

    problems: dict[str, str] = {}
    with _logged("jax._src.xla_bridge") as messages:
        try:
            jax.devices()
        except RuntimeError as error:
            problems["device"] = " ".join(str(error).split())
    problems |= {f"plugin {index}": one for index, one in enumerate(messages, 1)}
    devices: list[dict[str, Any]] = []
    if "device" in problems:
        return devices, problems
    for platform in ("gpu", "cpu"):
        try:
            devices += [
                {"platform": one.platform, "kind": one.device_kind, "id": one.id}
                for one in jax.devices(platform)
            ]
        except RuntimeError as error:
            problems[platform] = " ".join(str(error).split())
    return devices, problems


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """What is logged in the block, in a line each, instead of to standard error."""
    messages: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler(logging.WARNING)

    def emit(record: logging.LogRecord) -> None:
        raised = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() + (f": {raised}" if raised else "")
        messages.append(" ".join(text.split()))

    handler.emit = emit
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _implementations() -> dict[str, str | None]:
    """Each attention implementation, with the reason why it cannot run, or None."""
    from pallas_kernels.implementations import ImplementationError, check_device

    found: dict[str, str | None] = {}
    for name in IMPLEMENTATIONS:
        try:
            check_device(name)
            found[name] = None
        except ImplementationError as error:
            found[name] = str(error).partition("cannot run: ")[2]
    return found


def _missing(packages: tuple[str, ...]) -> list[str]:
    def is_installed(package: str) -> bool:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return find_spec(package.replace("-", "_")) is not None
        return True

    return [package for package in packages if not is_installed(package)]


def _cache() -> dict[str, Any]:
    """Folder, its size and what is free on its disk, and the model that is fetched by default."""
    import models
    from models.download import SMOLLM2

    folder = models.cache_dir()
    model = folder / "models" / SMOLLM2.file_name
    return {
        "folder": str(folder),
        "models_bytes": _size(folder / "models"),
        "compiled_bytes": _size(folder / "jax"),
        "disk_free_bytes": shutil.disk_usage(_existing(folder)).free,
        "smollm2": str(model) if model.exists() else None,
    }


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def _size(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
