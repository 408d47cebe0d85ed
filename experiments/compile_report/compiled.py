"""Compiling one function for a GPU that is not there, and the record of what came out."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.compile_report.hlo import Module
from experiments.compile_report.pool_copies import pool_copies
from experiments.compile_report.ptx import (
    assemble,
    count_instructions,
    parse_entries,
    parse_mosaic_shared,
    parse_ptxas,
)
from experiments.compile_report.target import GpuTarget, device_mesh, find_ptxas, lowering_for
from experiments.compile_report.thunks import (
    COMMAND_BUFFER,
    Thunk,
    parse_thunk_operations,
    parse_thunks,
)

TRITON_TARGET = "__gpu$xla.gpu.triton"
MOSAIC_TARGET = "mosaic_gpu"
_MOSAIC_SUFFIX = "_mosaic_gpu_kernel"  # that Mosaic adds to a kernel's name
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
_MOSAIC_DUMP_VARIABLE = "MOSAIC_GPU_DUMP_TO"


@dataclass(frozen=True)
class KernelResources:
    """What one Pallas kernel of a program needs. Shared memory and spills are in bytes.

    Attributes:
      backend: "triton" or "mosaic_gpu".
      instructions: of the PTX.
      threads: of one program.
      shared: static and dynamic, of one program.
      occupancy: programs that one multiprocessor can hold at a time.
    """

    name: str
    backend: str
    instructions: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    threads: int
    occupancy: int


@dataclass(frozen=True)
class CompiledProgram:
    """What the compiler made of a function.

    Attributes:
      hlo: the optimised module, as text.
      kernels: the Pallas kernels in it, each once.
      thunks: what it launches, in order.
      pallas_launches, captured_pallas_launches: places in the program that launch a Pallas kernel,
        and how many of these are inside command buffers.
      argument_bytes, temporary_bytes, aliased_bytes: of one device.
    """

    hlo: str
    kernels: tuple[KernelResources, ...]
    thunks: tuple[Thunk, ...]
    pallas_launches: int
    captured_pallas_launches: int
    argument_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    seconds: float

    @property
    def collectives(self) -> dict[str, int]:
        """How many operations of each kind exchange data between devices."""
        kinds = (operation.kind for _, operation in Module(self.hlo).unfused())
        starts = (kind.removesuffix("-start") for kind in kinds)
        return dict(Counter(kind for kind in starts if kind in _COLLECTIVES))

    @property
    def command_buffers(self) -> int:
        return sum(thunk.kind == COMMAND_BUFFER for thunk in self.thunks)

    def pool_copies(self, *, pool_bytes: int, layer_bytes: int) -> list[str]:
        """See `experiments.compile_report.pool_copies`."""
        return pool_copies(
            hlo=self.hlo,
            temporary_bytes=self.temporary_bytes,
            aliased_bytes=self.aliased_bytes,
            pool_bytes=pool_bytes,
            layer_bytes=layer_bytes,
        )


def compile_for(
    target: GpuTarget,
    function: Callable,
    arguments: tuple,
    *,
    donated: int | tuple[int, ...] = (),
    options: dict[str, Any] | None = None,
    dump: Path | None = None,
) -> CompiledProgram:
    """Compiles `function` for `target` and reads what the compiler leaves behind.

    Args:
      arguments: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are put on one device.
      donated: arguments whose arrays the program may overwrite.
      options: XLA's flags, as `xla_gpu_...`.
      dump: an empty folder that keeps what the compiler writes.

    Raises:
      UserError: when this machine cannot compile for a GPU.
    """
    single = NamedSharding(device_mesh(target), PartitionSpec())

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or single)

    with _folder(dump) as folder, _mosaic_dumps(folder):
        start = time.perf_counter()
        with lowering_for(target):
            jitted = jax.jit(function, donate_argnums=donated)
            lowered = jitted.lower(*jax.tree.map(placed, arguments))
            compiled = lowered.compile(
                compiler_options={
                    "xla_dump_to": str(folder),
                    "xla_dump_hlo_as_text": True,
                    "xla_dump_emitter_re": "ptx",
                    **(options or {}),
                }
            )
        seconds = time.perf_counter() - start
        hlo = compiled.as_text() or ""
        memory: Any = compiled.memory_analysis()
        thunks = parse_thunks(_thunk_outline(folder))
        backends = _pallas_thunks(hlo, _read_all(folder, "*thunk_metadata.txt"), thunks)
        launches = [thunk for thunk, backend in backends if backend == "triton"]
        triton = list(_triton_kernels(folder, target, launches))
        mosaic = list(_mosaic_kernels(folder, target))
        if len(launches) < len(backends) and not mosaic:
            raise RuntimeError(
                "a Mosaic kernel left no report: JAX had compiled it before in this process; "
                "compile the program in a process of its own"
            )
        return CompiledProgram(
            hlo,
            (*triton, *mosaic),
            tuple(thunks),
            len(backends),
            sum(thunk.captured for thunk, _ in backends),
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.alias_size_in_bytes,
            seconds,
        )


def _pallas_thunks(hlo: str, metadata: str, thunks: list[Thunk]) -> list[tuple[Thunk, str]]:
    """The thunks that launch a Pallas kernel, with its backend."""
    targets = Module(hlo).custom_calls()
    operations = parse_thunk_operations(metadata)
    found = []
    for thunk in thunks:
        if thunk.kind == COMMAND_BUFFER:
            continue
        target = targets.get(operations.get(thunk.identifier, ""), "")
        if target == TRITON_TARGET:
            found.append((thunk, "triton"))
        elif target.startswith(MOSAIC_TARGET):
            found.append((thunk, "mosaic_gpu"))
    return found


def _triton_kernels(
    folder: Path, target: GpuTarget, launches: list[Thunk]
) -> Iterator[KernelResources]:
    """XLA assembles Triton kernels without a report, so their dumped PTX is assembled once more."""
    ptxas = find_ptxas()
    assert ptxas is not None  # device_mesh has checked
    wanted = {thunk.kernel: thunk for thunk in launches}
    for path in sorted(folder.glob("*.ptx")):
        instructions = count_instructions(path.read_text())
        names = wanted.keys() & instructions.keys()
        if not names:
            continue
        assembled = assemble(ptxas, path, target.architecture)
        for name in sorted(names):
            launch, kernel = wanted.pop(name), assembled[name]
            shared = launch.shared + kernel.static_shared
            size = instructions[name], shared, launch.threads
            yield _resources(name, "triton", target, kernel, *size)


def _mosaic_kernels(folder: Path, target: GpuTarget) -> Iterator[KernelResources]:
    """Mosaic dumps the assembler's report beside the PTX."""
    for report in sorted(folder.glob("*.ptxas")):
        ptx = report.with_suffix(".ptx").read_text()
        threads, instructions = parse_entries(ptx), count_instructions(ptx)
        dynamic = parse_mosaic_shared(report.with_suffix(".mlir-passes.log"))
        for name, kernel in parse_ptxas(report.read_text()).items():
            shared = dynamic + kernel.static_shared
            short = name.removesuffix(_MOSAIC_SUFFIX)
            size = instructions[name], shared, threads[name]
            yield _resources(short, "mosaic_gpu", target, kernel, *size)


def _resources(
    name, backend, target: GpuTarget, kernel, instructions, shared, threads
) -> KernelResources:
    occupancy = target.programs_per_multiprocessor(
        registers=kernel.registers, shared=shared, threads=threads
    )
    return KernelResources(
        name,
        backend,
        instructions,
        kernel.registers,
        kernel.spill_stores,
        kernel.spill_loads,
        shared,
        threads,
        occupancy,
    )


def _thunk_outline(folder: Path) -> str:
    """The final sequence; XLA writes a second file only if its passes changed the first."""
    return _read_all(folder, "*thunk_sequence_after_thunk_passes.txt") or _read_all(
        folder, "*thunk_sequence.txt"
    )


def _read_all(folder: Path, pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(pattern)))


@contextmanager
def _folder(dump: Path | None) -> Iterator[Path]:
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        yield dump
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def _mosaic_dumps(folder: Path) -> Iterator[None]:
    """Mosaic looks for its folder in the environment, at each kernel."""
    before = os.environ.get(_MOSAIC_DUMP_VARIABLE)
    os.environ[_MOSAIC_DUMP_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MOSAIC_DUMP_VARIABLE]
        else:
            os.environ[_MOSAIC_DUMP_VARIABLE] = before
