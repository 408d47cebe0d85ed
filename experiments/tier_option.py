"""The options `--host-memory`, `--disk` and `--disk-memory`: what is behind the KV pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import by_default

HostMemory = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="SIZE",
        help="Memory of the host for chunks that the pool gives up, such as 8GiB.",
        help_behavior_hint="(default: none)",
    ),
]
Disk = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="FOLDER",
        help="Where chunks are kept in files, which later runs find.",
        help_behavior_hint="(default: none)",
    ),
]
DiskMemory = Annotated[str, by_default("SIZE", "20GiB")]


class WithTiers(Protocol):
    """A config with these options."""

    @property
    def host_memory(self) -> str | None: ...

    @property
    def disk(self) -> Path | None: ...

    @property
    def disk_memory(self) -> str: ...


def check_tiers(config: WithTiers, *, sharing: bool = True) -> None:
    """Raise `UserError` for tiers without a cache before them, or of no size."""
    from jax_chunkattn.device.cache_config import parse_bytes

    for name in ("host_memory", "disk_memory"):
        size = getattr(config, name)
        try:
            _ = None if size is None else parse_bytes(size)
        except ValueError as error:
            raise UserError(f"--{name.replace('_', '-')}: {error}") from None
    if not sharing and (config.host_memory is not None or config.disk is not None):
        raise UserError("--host-memory and --disk are of no use with --no-sharing")


@contextmanager
def tier_errors(config: WithTiers) -> Iterator[None]:
    """What an engine says of its tiers as errors of who has asked for them."""
    from jax_chunkattn.engine.residency import TierError

    try:
        yield
    except TierError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if config.disk is None:
            raise
        raise UserError(f"--disk {config.disk}: {error.strerror or error}") from error


def tiers_of(config: WithTiers) -> dict[str, Any]:
    """What `CacheConfig` takes for them."""
    of_disk = {"disk": config.disk, "disk_memory": config.disk_memory}
    return {"host_memory": config.host_memory, **(of_disk if config.disk is not None else {})}
