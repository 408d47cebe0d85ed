"""Registers, spills and shared memory of kernels, from their PTX and what `ptxas` says of it."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?")
_INSTRUCTION = re.compile(r"^\s+(?:@!?%\w+\s+)?[a-z][\w.:]*(?:\s[^\n]*)?;", re.MULTILINE)
_COMPILING = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")
_CONSTANT = re.compile(r"(%\S+) = arith\.constant (\d+) : i32")
_LAUNCH_SHARED = re.compile(r"gpu\.launch.* dynamic_shared_memory_size (%\S+)")


@dataclass(frozen=True)
class Assembled:
    """What the assembler reports of one kernel; sizes in bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    static_shared: int


def parse_ptxas(report: str) -> dict[str, Assembled]:
    """The report of `ptxas -v`, by kernel."""
    kernels = {}
    _, *parts = _COMPILING.split(report)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        used = _USED.search(text)
        if used is None:
            continue
        spills = _SPILLS.search(text)
        stores, loads = spills.groups() if spills else (0, 0)
        shared = _STATIC_SHARED.search(text)
        kernels[name] = Assembled(
            int(used[1]), int(stores), int(loads), int(shared[1]) if shared else 0
        )
    return kernels


def parse_entries(ptx: str) -> dict[str, int]:
    """Threads of a program of each kernel in a PTX file; 0 when the file does not say."""
    _, *parts = _ENTRY.split(ptx)
    threads = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        found = _THREADS.search(text)
        threads[name] = math.prod(int(size or 1) for size in found.groups()) if found else 0
    return threads


def count_instructions(ptx: str) -> dict[str, int]:
    """Instructions of each kernel in a PTX file."""
    _, *parts = _ENTRY.split(ptx)
    return {
        name: len(_INSTRUCTION.findall(text))
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def parse_mosaic_shared(passes: Path) -> int:
    """Dynamic shared memory, in bytes, that a Mosaic kernel is launched with.

    Told only by the MLIR before its passes, at the head of a log of megabytes; 0 when it is not
    there.
    """
    constants: dict[str, int] = {}
    with passes.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := _CONSTANT.search(line):
                constants[found[1]] = int(found[2])
            elif found := _LAUNCH_SHARED.search(line):
                return constants.get(found[1], 0)
    return 0


def assemble(ptxas: Path, ptx: Path, architecture: str) -> dict[str, Assembled]:
    """Runs `ptxas -v` on a PTX file."""
    command = [str(ptxas), "-v", f"--gpu-name={architecture}", str(ptx), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_ptxas(done.stderr + done.stdout)
