"""Where programs are compiled and run: on a GPU, in rehearsal on a CPU, or only compiled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from experiments.gpu.budget import Budget
from experiments.gpu.record import Record
from experiments.harness.errors import UserError
from pallas_kernels.targets import A100, current_target, use_target

Mode = Literal["measure", "dry-run", "compile-only"]


@dataclass(frozen=True)
class Program:
    """A function to compile.

    Attributes:
      key: what tells it from all others.
      arguments: pytrees of `jax.ShapeDtypeStruct`, or of arrays, of which only shapes count.
      donated: indices of arguments that it may overwrite.
      options: of XLA.
    """

    key: Hashable
    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """What the parts of a run share.

    Attributes:
      facts: what one part measured and others use: the device's rates.
      compiled: programs by key; an exception where one did not compile.
    """

    mode: Mode
    record: Record
    budget: Budget
    folder: Any
    seed: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    compiled: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether programs are run at all."""
        return self.mode != "compile-only"

    @property
    def small(self) -> bool:
        """Whether cases must be tiny, because kernels are interpreted."""
        return self.mode == "dry-run"

    @property
    def backends(self) -> dict[str, str | None]:
        """The Pallas backends, and why one cannot run here at all."""
        capability = current_target().compute_capability or (0, 0)
        hopper = capability[0] == 9
        reason = "the rehearsal interprets Triton kernels only: Mosaic's interpreter is too slow"
        if not self.small:
            reason = f"it needs compute capability 9 (Hopper), and the device has {capability}"
        return {"pallas_mosaic_gpu": None if hopper else reason, "pallas_triton": None}

    def compile(self, programs: Iterable[Program]) -> None:
        """Compiles what is not compiled yet, several at a time; see `compiled`.

        Tracing and lowering hold Python's lock, XLA does not: it works in threads meanwhile.
        """
        waiting = {}
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for program in programs:
                if program.key in self.compiled or program.key in waiting:
                    continue
                try:
                    lowered = self.lower(program)
                except Exception as error:
                    self.compiled[program.key] = error
                    continue
                waiting[program.key] = pool.submit(_compile, lowered, program.options)
            for key, future in waiting.items():
                error = future.exception()
                self.compiled[key] = future.result() if error is None else error

    def get(self, program: Program) -> Any:
        """The compiled program.

        Raises:
          Exception: what its compilation raised.
        """
        self.compile([program])
        result = self.compiled[program.key]
        if isinstance(result, BaseException):
            raise result
        return result

    def lower(self, program: Program):
        arguments = jax.tree.map(self._abstract, program.arguments)
        return jax.jit(program.function, donate_argnums=program.donated).lower(*arguments)

    def _abstract(self, leaf):
        sharding = _described_gpu() if self.mode == "compile-only" else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compile(lowered, options: dict[str, Any]):
    return lowered.compile(compiler_options=options or None)


@contextlib.contextmanager
def device_for(mode: Mode) -> Iterator[None]:
    """Within it, kernels are chosen and lowered for the device of a mode.

    Raises:
      UserError: when there is no such device.
    """
    if mode == "compile-only":
        from experiments.compile_report.target import lowering_for, target_named

        with lowering_for(target_named("h200")):
            _described_gpu()
            yield
        return
    if mode == "dry-run":
        cpu = jax.devices("cpu")[0]
        with jax.default_device(cpu), use_target(replace(A100, interpret=True)):
            yield
        return
    device = jax.devices()[0]
    if not current_target().is_nvidia:
        raise UserError(
            f"there is no NVIDIA GPU here, the device is {device.device_kind!r}; "
            "--dry-run rehearses on a CPU, --compile-only compiles for an H200"
        )
    yield


_PLACES: list[Any] = []


def _described_gpu():
    """The one H200 that exists only as a description."""
    if not _PLACES:
        from jax.sharding import NamedSharding, PartitionSpec

        from experiments.compile_report.target import device_mesh, target_named

        _PLACES.append(NamedSharding(device_mesh(target_named("h200")), PartitionSpec()))
    return _PLACES[0]
