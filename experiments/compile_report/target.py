"""The GPUs that programs can be compiled for, and the context that JAX needs to do so."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.harness.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

EXTRA = "jax_chunkattn[gpu-check]"
_COMPILER_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclass(frozen=True)
class GpuTarget:
    """What the compiler must know of a GPU. Sizes are in bytes, limits per multiprocessor.

    Attributes:
      device_kind: the name JAX shows for the device.
      compute_capability: major and minor.
      architecture: the name `ptxas` knows it by.
      multiprocessors: of the whole device.
      shared_memory: of a multiprocessor; one program can have `program_shared_memory` of it.
      memory, l2_cache: of the device.
      memory_bandwidth: bytes a second.
      clock_ghz: of the multiprocessors.
    """

    name: str
    device_kind: str
    compute_capability: tuple[int, int]
    architecture: str
    multiprocessors: int
    shared_memory: int
    program_shared_memory: int
    memory: int
    l2_cache: int
    memory_bandwidth: int
    clock_ghz: float
    registers: int = 65536
    threads: int = 2048
    programs: int = 32

    @property
    def description(self) -> str:
        """XLA's `GpuTargetConfigProto`, as text."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory}
  threads_per_core_limit: {self.threads}
  core_count: {self.multiprocessors}
  fpus_per_core: {128 if major >= 9 else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.program_shared_memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {self.registers}
  registers_per_block_limit: {self.registers}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.device_kind}"
"""

    @property
    def backends(self) -> tuple[str, ...]:
        """The project's GPU backends that this GPU can run."""
        hopper = self.compute_capability[0] == 9
        return ("pallas_triton", "pallas_mosaic_gpu") if hopper else ("pallas_triton",)

    def programs_per_multiprocessor(self, *, registers: int, shared: int, threads: int) -> int:
        """How many programs of a kernel one multiprocessor can hold at a time: its occupancy.

        Registers are given to a warp in blocks of 256, and every program's shared memory comes
        with 1 KiB that the driver keeps (CUDA C++ programming guide, compute capabilities).
        """
        warps = -(-threads // 32)
        warp_registers = -(-max(registers, 1) * 32 // 256) * 256
        return min(
            self.programs,
            self.threads // (warps * 32),
            self.registers // (warp_registers * warps),
            self.shared_memory // (shared + 1024),
        )


TARGETS = {
    target.name: target
    for target in (
        GpuTarget(
            "h200", "NVIDIA H200", (9, 0), "sm_90a", 132,
            233_472, 232_448, 150_000_000_000, 52_428_800, 4_800_000_000_000, 1.98,
        ),
        GpuTarget(
            "h100", "NVIDIA H100 80GB HBM3", (9, 0), "sm_90a", 132,
            233_472, 232_448, 85_000_000_000, 52_428_800, 3_350_000_000_000, 1.98,
        ),
        GpuTarget(
            "a100", "NVIDIA A100-SXM4-80GB", (8, 0), "sm_80", 108,
            167_936, 166_912, 85_000_000_000, 41_943_040, 2_039_000_000_000, 1.41,
        ),
    )
}  # fmt: skip


def target_named(name: str) -> GpuTarget:
    """The target called `name`; UserError for one that is not known."""
    if name not in TARGETS:
        raise UserError(f"unknown GPU {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def check_installed() -> None:
    """Raise `UserError`, naming the extra to install, when something the compiler needs lacks."""
    missing = []
    if not any(map(_has_module, _PLUGINS)):
        missing.append("JAX's CUDA plugin")
    if find_ptxas() is None:
        missing.append("ptxas")
    if not _has_module("absl"):
        missing.append("absl-py")
    if missing:
        raise UserError(
            f"compiling for a GPU needs {' and '.join(missing)}, which cannot be found here; "
            f"on Linux, no GPU needed: pip install '{EXTRA}'"
        )


def find_ptxas() -> Path | None:
    """The assembler of the nvidia-cuda-nvcc wheel, or one on PATH."""
    for package in _COMPILER_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            for file in metadata.distribution(package).files or ():
                path = Path(str(file.locate()))
                if file.name == "ptxas" and os.access(path, os.X_OK):
                    return path
    found = shutil.which("ptxas")
    return Path(found) if found else None


def device_mesh(target: GpuTarget, num_devices: int = 1, axis: str = "tp") -> Mesh:
    """A mesh of one axis over GPUs that exist only as a description; for compiling, not running.

    Raises:
      UserError: when the plugin is missing, was made for another JAX or refuses the description.
    """
    check_installed()
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.name,
            topology=f"1x{num_devices}x1",
            target_config=target.description,
        )
    except Exception as error:  # the plugin raises RuntimeError, NotImplementedError, KeyError...
        raise UserError(
            f"JAX's CUDA plugin cannot compile for {target.device_kind} here: {error}; it must "
            f"have the version of jax, {metadata.version('jax')}: pip install '{EXTRA}'"
        ) from error
    return topologies.make_mesh(topology, (num_devices,), (axis,))


@contextlib.contextmanager
def lowering_for(target: GpuTarget) -> Iterator[None]:
    """Within it, the project chooses kernels for `target`, and JAX lowers them for it.

    From jax 0.11 on Pallas asks the abstract mesh what device a kernel is for; before, it takes
    compute capability 9.0 when no GPU is present.
    """
    import jax

    from pallas_kernels.targets import Target, use_target

    chosen = Target("gpu", target.device_kind, target.compute_capability, target.multiprocessors)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_target(chosen))
        if jax.__version_info__ >= (0, 11):
            from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

            device = AbstractDevice(device_kind=target.device_kind, num_cores=None, platform="gpu")
            mesh = AbstractMesh((), (), abstract_device=device)
            stack.enter_context(use_abstract_mesh(mesh))
        yield


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
