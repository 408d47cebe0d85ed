"""Part `target`: exactly which device this is, and XLA's description of it.

With the description kept as data, programs can be compiled for this very device where there is
none.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.gpu.bench import Bench, Program

DESCRIPTION = "device-target.txt"
_FIELDS = {
    "core_count": "multiprocessors",
    "l2_cache_size": "bytes of L2",
    "device_memory_size": "bytes of memory",
    "shared_memory_per_block_optin": "bytes of shared memory",
    "clock_rate_ghz": "GHz",
    "memory_bandwidth": "bytes a second",
}


def run(bench: Bench) -> None:
    description = _from_topology() or _from_dump(bench)
    device = jax.devices()[0]
    bench.record.measured("device", "kind", device.device_kind, "name")
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        bench.record.measured("device", "compute capability", str(capability), "version")
    for name, value in driver().items():
        bench.record.measured("device", name, value, "as told by nvidia-smi")
    if not description:
        bench.record.skipped("device", "target description", "XLA describes no GPU here")
        return
    (Path(bench.folder.path) / DESCRIPTION).write_text(description)
    bench.record.measured("device", "target description", DESCRIPTION, "file")
    for name, unit in _FIELDS.items():
        found = re.search(rf"\b{name}: ([\d.e+]+)", description)
        if found:
            value = float(found.group(1))
            bench.facts[name] = value
            bench.record.measured("device", name, value, unit)


def driver() -> dict[str, str]:
    """The driver's version and the card's memory and clocks; empty without one."""
    if not shutil.which("nvidia-smi"):
        return {}
    names = ("driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = said.stdout.splitlines()[0] if said.stdout.strip() else ""
    return dict(zip(names, (value.strip() for value in first.split(",")), strict=False))


def _from_topology() -> str | None:
    try:
        xla_client: Any = importlib.import_module("jax._src.lib").xla_client
        topology = xla_client.get_topology_for_devices(jax.devices())
        return str(topology.target_config) if topology.target_config else None
    except Exception:
        return None


def _from_dump(bench: Bench) -> str | None:
    """What XLA writes beside a program that it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        ones = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        program = Program(("describe", folder), lambda x: x + 1, (ones,), options=options)
        try:
            bench.get(program)
        except Exception as error:
            bench.record.failed("device", "dump", error)
            return None
        found = sorted(Path(folder).glob("*gpu_target_config.pbtxt"))
        return found[0].read_text() if found else None
