"""Reading the text of an optimised HLO module: computations, and what each operation makes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("f16", "bf16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_RESULT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_KIND = re.compile(r" ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ALIASED_OUTPUT = re.compile(r"\{(\d*)\}: \(")


@dataclass(frozen=True)
class Array:
    """One array that an operation makes."""

    dtype: str
    dims: str

    @property
    def nbytes(self) -> int:
        elements = math.prod(int(size) for size in self.dims.split(",") if size)
        return _BYTES.get(self.dtype, 0) * elements

    def __str__(self) -> str:
        return f"{self.dtype}[{self.dims}]"


@dataclass(frozen=True)
class Operation:
    """One line of a computation. `results` are the arrays it makes, nested tuples flattened."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The computation, or quoted text, that the attribute `name` holds."""
        found = re.search(rf'\b{name}=(?:%?([\w.\-]+)|"([^"]*)")', self.attributes)
        return (found.group(1) or found.group(2)) if found else None

    @property
    def aliased_results(self) -> set[int]:
        """Indices of the results of a custom call that are written over an operand."""
        _, _, aliasing = self.attributes.partition("output_to_operand_aliasing={")
        aliasing = aliasing.partition(")}")[0]
        return {int(index or 0) for index in _ALIASED_OUTPUT.findall(aliasing)}


class Module:
    """An HLO module: `computations` by name, each a list of operations."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Operation]] = {}
        current: list[Operation] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header.group(1), [])
            elif operation := _parse(line):
                current.append(operation)
        self.fused = self._fused()

    def _fused(self) -> set[str]:
        """Computations inside another operation: their intermediate results take no memory."""
        inside = set()
        for operations in self.computations.values():
            for operation in operations:
                if operation.kind in ("fusion", "fusion-start"):
                    inside.add(operation.attribute("calls"))
                elif operation.kind != "call":
                    inside.add(operation.attribute("to_apply"))
        return inside - {None}

    def unfused(self) -> list[tuple[str, Operation]]:
        """Operations whose results are arrays in memory, with their computation's name."""
        return [
            (computation, operation)
            for computation, operations in self.computations.items()
            if computation not in self.fused
            for operation in operations
        ]

    def custom_calls(self) -> dict[str, str]:
        """Target of each custom call, by the operation's name."""
        calls = [operation for _, operation in self.unfused() if "custom-call" in operation.kind]
        return {call.name: call.attribute("custom_call_target") or "" for call in calls}


def _parse(line: str) -> Operation | None:
    start = _RESULT.match(line)
    if not start:
        return None
    rest = line[start.end() :]
    # A tuple's shape may hold parentheses of its own, so its end is counted.
    shape_end = _closing(rest, 0) if rest.startswith("(") else 0
    found = _KIND.search(rest, shape_end)
    if not found:
        return None
    kind, shape = found.group(1), rest[: found.start()]
    operands_end = _closing(rest, found.end() - 1)
    return Operation(
        start.group(2),
        kind,
        _results(kind, shape),
        tuple(_OPERAND.findall(rest[found.end() : operands_end])),
        rest[operands_end:].partition(", metadata=")[0] + _after_metadata(rest[operands_end:]),
        bool(start.group(1)),
    )


def _results(kind: str, shape: str) -> tuple[Array, ...]:
    """The arrays an operation makes; of an asynchronous start, without those it only holds."""
    if kind == "copy-start":  # (destination, source, context)
        return _arrays(shape)[:1]
    if kind.endswith("-start") and shape.startswith("(("):  # ((operands), results, context)
        return _arrays(shape[_closing(shape, 1) :])
    return _arrays(shape)


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(Array(*found) for found in _ARRAY.findall(shape))


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def _after_metadata(attributes: str) -> str:
    _, _, rest = attributes.partition(", metadata={")
    return rest.partition("}")[2]
