"""Does a compiled program copy the pool? Read off the program XLA made, without running it."""

from __future__ import annotations

import math
import re

_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\w+\[[\d,]*\]\S*) ([\w\-]+)\((.*)")
_NO_WORK = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "call"}
_IN_PLACE = re.compile(r"scatter|dynamic[-_]update[-_]slice")


def pool_sized_operations(hlo: str, min_bytes: int) -> list[str]:
    """Operations outside fusions that make a new array of at least `min_bytes`.

    Scatters and dynamic update slices are left out, fused or not: they write into their operand.
    """
    found = []
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header.group(1)
            continue
        operation = _OPERATION.match(line)
        if not operation or operation.group(2) in _NO_WORK or "fused" in computation:
            continue
        shapes, kind, _ = operation.groups()
        if _IN_PLACE.search(line.split("metadata")[0]):
            continue
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
            if size >= min_bytes:
                found.append(f"{kind} {dtype}[{dims}] in {computation}")
    return found


def assert_pool_is_updated_in_place(compiled, *, pool_bytes: int, layer_bytes: int) -> None:
    """The three signs of a copy: large temporaries, pools not aliased, pool-sized results."""
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < layer_bytes
    assert memory.alias_size_in_bytes >= pool_bytes
    assert pool_sized_operations(compiled.as_text(), layer_bytes) == []
