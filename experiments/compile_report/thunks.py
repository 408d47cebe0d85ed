"""What a program for a GPU launches, and what of it is captured in command buffers.

XLA dumps the sequence of its "thunks" as an indented outline: a kernel with its grid, threads and
dynamic shared memory, a loop with its body, a command buffer (a CUDA graph) with what it captured.
A launch outside command buffers costs the host some microseconds each time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

_THUNK = re.compile(r"^( *)(\d+): (k\w+)\s*(?:\[[^\]]*\])?\s*(.*)$")
_LAUNCH = re.compile(
    r"^(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes"
)
_METADATA = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')
COMMAND_BUFFER = "kCommandBuffer"


@dataclass(frozen=True)
class Thunk:
    """One step of a program.

    Attributes:
      identifier: the number that XLA's metadata knows it by; command buffers all have 0.
      kernel: of a kernel launch, the kernel's name in the PTX; else empty.
      grid, threads: programs, and threads of a program.
      shared: dynamic shared memory, in bytes.
      captured: whether it is inside a command buffer.
    """

    identifier: int
    kind: str
    captured: bool
    kernel: str = ""
    grid: int = 0
    threads: int = 0
    shared: int = 0


def parse_thunks(outline: str) -> list[Thunk]:
    """The thunks of a dumped sequence, in its order."""
    thunks = []
    enclosing: list[tuple[int, str]] = []  # (indentation, kind) from the outermost
    for line in outline.splitlines():
        found = _THUNK.match(line)
        if not found:
            continue
        indentation, kind = len(found.group(1)), found.group(3)
        while enclosing and enclosing[-1][0] >= indentation:
            enclosing.pop()
        captured = any(outer == COMMAND_BUFFER for _, outer in enclosing)
        enclosing.append((indentation, kind))
        launch = _LAUNCH.match(found.group(4))
        thunk = Thunk(int(found.group(2)), kind, captured)
        if launch:
            name, grid, threads, shared = launch.groups()
            thunk = replace(
                thunk,
                kernel=name,
                grid=_product(grid),
                threads=_product(threads),
                shared=int(shared),
            )
        thunks.append(thunk)
    return thunks


def parse_thunk_operations(metadata: str) -> dict[int, str]:
    """Which HLO operation each thunk, by its identifier, came from."""
    return {int(identifier): name for name, identifier in _METADATA.findall(metadata)}


def _product(numbers: str) -> int:
    return math.prod(map(int, numbers.split(",")))
