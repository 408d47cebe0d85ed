"""What the kernels run on: the default device, or one that is only compiled for or interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """A device as far as the choice and the shape of kernels depend on it.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      name: as its maker calls it.
      compute_capability: of an NVIDIA GPU, (9, 0) for Hopper; None elsewhere.
      num_sms: streaming multiprocessors of a GPU; 0 elsewhere.
      interpret: run Pallas kernels in the interpreter, on the CPU. For tests: it takes tenths of
        milliseconds a program, and what it accepts a GPU may refuse.
    """

    platform: str
    name: str
    compute_capability: tuple[int, int] | None = None
    num_sms: int = 0
    interpret: bool = False

    @property
    def is_nvidia(self) -> bool:
        return self.compute_capability is not None


H200 = Target("gpu", "NVIDIA H200", (9, 0), 132)
A100 = Target("gpu", "NVIDIA A100", (8, 0), 108)

_override: ContextVar[Target | None] = ContextVar("target", default=None)


def current_target() -> Target:
    """The target set by `use_target`, or the device that JAX puts new arrays on."""
    return _override.get() or _of_device(
        jax.config.values["jax_default_device"] or jax.devices()[0]
    )


@contextmanager
def use_target(target: Target) -> Iterator[None]:
    """Chooses kernels for `target` inside the block, whatever device there is.

    What is traced inside must be lowered for that device, or interpreted. A function that jax.jit
    traced before is not traced again.
    """
    token = _override.set(target)
    try:
        yield
    finally:
        _override.reset(token)


def _of_device(device) -> Target:
    if isinstance(device, str):
        device = jax.devices(device)[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None or "." not in str(capability):
        return Target(device.platform, device.device_kind)
    major, minor = map(int, str(capability).split("."))
    return Target("gpu", device.device_kind, (major, minor), device.core_count)
