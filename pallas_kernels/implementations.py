"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax

from pallas_kernels.targets import Target, current_target

PREFERENCE = ("pallas_mosaic_gpu", "pallas_triton", "xla")
"""The first of these that runs is what `implementation=None` means."""


class ImplementationError(ValueError):
    """An implementation that is not known, or cannot run here; the message says why."""


@dataclass(frozen=True)
class AttentionShapes:
    """What decides whether a kernel exists for a call.

    Attributes:
      dtype: of the pool; the Pallas kernels round queries to it.
      group: query heads for each KV head, G.
      head_dim: D.
      chunk_size: C.
    """

    dtype: str
    group: int
    head_dim: int
    chunk_size: int

    @classmethod
    def of(cls, q: Any, keys: Any) -> AttentionShapes:
        """Of queries [*, Hq, D] and a pool [L, Hkv, N, C, D].

        Raises:
          ValueError: for heads that do not divide, or a head_dim that differs from the pool's.
        """
        kv_heads, chunk_size, head_dim = keys.shape[1], *keys.shape[3:]
        if q.shape[-1] != head_dim:
            raise ValueError(f"queries have head_dim {q.shape[-1]}, the pool has {head_dim}")
        if q.shape[1] % kv_heads:
            raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_heads} KV heads")
        return cls(str(keys.dtype), q.shape[1] // kv_heads, head_dim, chunk_size)


@dataclass(frozen=True)
class Operation:
    """An operation with several implementations, each in a module of its name.

    Attributes:
      package: where the modules are; each has a function with the operation's name, and those of
        kernels a function `unsupported(shapes) -> str | None`.
      name: of the operation.
      implementations: names that may be asked for.
    """

    package: str
    name: str
    implementations: tuple[str, ...]

    def function(self, implementation: str):
        """The function of an implementation. Kernels' modules are imported when first used."""
        return getattr(import_module(f"{self.package}.{implementation}"), self.name)

    def resolve(self, implementation: str | None, shapes: AttentionShapes) -> str:
        """The name to run: the one asked for, or the best on this device for None.

        Raises:
          ImplementationError: for a name that is not known, or that cannot run here, with the
            reason; nothing is ever substituted.
        """
        if implementation is None:
            candidates = [name for name in PREFERENCE if name in self.implementations]
            return next(name for name in candidates if self._problem(name, shapes) is None)
        check_known(implementation, self.implementations)
        _refuse_for(implementation, self._problem(implementation, shapes))
        return implementation

    def _problem(self, implementation: str, shapes: AttentionShapes) -> str | None:
        if not needs_partials(implementation):
            return None
        problem = _device_problem(implementation, current_target())
        if problem is not None:
            return problem
        try:
            module = import_module(f"{self.package}.{implementation}")
        except ImportError as error:
            return f"jax {jax.__version__} does not have what it needs: {error}"
        return module.unsupported(shapes)


def needs_partials(implementation: str) -> bool:
    """Whether plans for it must have slots for partials."""
    return implementation.startswith("pallas")


def check_device(implementation: str | None) -> None:
    """Raises ImplementationError where no shapes would let an implementation run."""
    if implementation is not None and needs_partials(implementation):
        _refuse_for(implementation, _device_problem(implementation, current_target()))


def check_known(implementation: str, known: Collection[str]) -> None:
    """Raises ImplementationError for a name that is not among the known ones."""
    if implementation not in known:
        raise ImplementationError(
            f"unknown implementation {implementation!r}; known: {', '.join(sorted(known))}"
        )


def _refuse_for(implementation: str, problem: str | None) -> None:
    if problem is not None:
        raise ImplementationError(f"implementation {implementation!r} cannot run: {problem}")


def _device_problem(implementation: str, target: Target) -> str | None:
    if target.compute_capability is None:
        return f"it needs an NVIDIA GPU, and the device is {target.name!r}"
    major, minor = target.compute_capability
    found = f"{target.name!r} has {major}.{minor}"
    if implementation == "pallas_mosaic_gpu" and major != 9:
        return f"it needs compute capability 9 (Hopper), and {found}"
    if major < 8:
        return f"it needs compute capability 8 (Ampere) or later, and {found}"
    return None
