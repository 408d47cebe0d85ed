"""Reads the header of a GGUF file: metadata, and where each tensor's bytes lie.

The `gguf` package's own reader builds a NumPy view per array element, which takes 3 s for a
49,152-token vocabulary, and reads past the end of a cut file without noticing. This one takes 0.1 s
and checks every length against the file before use. Format: docs/gguf.md of ggml, versions 2 and 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CheckpointError
from models.tensors import drop_pages

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
VALUES_AT_ONCE = 1 << 20
MOST_VALUES = 1 << 59  # of a tensor; NumPy counts so where a dimension is 0
STRING, ARRAY = 8, 9
SCALAR_DTYPES = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor still in its file. `shape` is outermost first, the reverse of GGUF's order.

    It takes `size` bytes from byte `begin` of the file on.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    mapping: mmap.mmap
    begin: int
    size: int

    @property
    def data(self) -> np.ndarray:
        """The bytes, mapped."""
        return np.frombuffer(self.mapping, np.uint8, self.size, self.begin)

    def dequantize(self) -> np.ndarray:
        """The values, `shape`, float32. Raises CheckpointError for a type gguf cannot decode.

        Some rows at a time, whose pages are then dropped: at the peak the values are resident, and
        little else. (gguf, asked for all, holds them twice.)
        """
        import gguf

        tensor_type = gguf.GGMLQuantizationType[self.type_name]
        block_size, type_size = gguf.GGML_QUANT_SIZES[tensor_type]
        row_bytes = self.shape[-1] // block_size * type_size
        values = np.empty((math.prod(self.shape[:-1]), self.shape[-1]), np.float32)
        if not values.size:
            return values.reshape(self.shape)
        stored = self.data.reshape(len(values), row_bytes)
        at_once = max(1, VALUES_AT_ONCE // self.shape[-1])
        try:
            for row in range(0, len(values), at_once):
                rows = slice(row, row + at_once)
                values[rows] = gguf.quants.dequantize(stored[rows], tensor_type)
                begin = self.begin + row * row_bytes
                drop_pages(self.mapping, begin, min(begin + at_once * row_bytes, self.end))
        except NotImplementedError:
            raise CheckpointError(
                f"tensor {self.name} is stored as {self.type_name}, which cannot be decoded here"
            ) from None
        return values.reshape(self.shape)

    @property
    def end(self) -> int:
        return self.begin + self.size


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """Metadata by key (scalars, strings, lists) and tensors; implements `models.tensors.Tensors`.

    `tensor` gives float32, whatever is stored.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def total_bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    @contextlib.contextmanager
    def tensor(self, name: str) -> Iterator[np.ndarray]:
        yield self.tensors[name].dequantize()

    def require(self, key: str) -> Any:
        """The metadata value of `key`; CheckpointError when the file has none."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing")
        return self.metadata[key]

    def require_list(self, key: str) -> list[Any]:
        """`require`, for an array."""
        value = self.require(key)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.path}: metadata {key!r} is not an array")
        return value


def read_gguf(path: str | Path) -> GGUFFile:
    """Open `path`; tensor bytes stay on disk (memory-mapped) until they are dequantised.

    Raises CheckpointError when the file is not GGUF, is cut short, or contradicts itself, and the
    usual OSError when it cannot be opened.
    """
    path = Path(path)
    if path.stat().st_size < len(MAGIC):
        raise CheckpointError(f"{path}: not a GGUF file (it has {path.stat().st_size} bytes)")
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(path, mapping)
    tensor_count, metadata_count = header.start()
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = header.string("a metadata key")
        if key in metadata:
            raise CheckpointError(f"{path}: metadata {key!r} appears twice")
        metadata[key] = header.value(header.integer("<I", f"the type of {key!r}"), key)
    entries = [header.tensor_entry() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: alignment {alignment!r} is not a power of two")
    data_start = -(-header.offset // alignment) * alignment
    tensors = _place_tensors(header, entries, data_start)
    drop_pages(mapping, 0, data_start)
    return GGUFFile(path, metadata, tensors)


@dataclasses.dataclass(frozen=True)
class _TensorEntry:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class _Header:
    """A cursor over the header that refuses to step past the end of the file."""

    def __init__(self, path: Path, mapping: mmap.mmap):
        self.path = path
        self.mapping = mapping
        self.buffer = memoryview(mapping)
        self.offset = 0

    def start(self) -> tuple[int, int]:
        """Check magic and version; return the counts of tensors and of metadata entries."""
        if bytes(self.take(len(MAGIC), "the magic")) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self.integer("<I", "the version")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            kind = "a big-endian file" if swapped else f"GGUF version {version}"
            raise CheckpointError(f"{self.path}: {kind} is not supported, only versions 2 and 3")
        return self.integer("<Q", "the tensor count"), self.integer("<Q", "the metadata count")

    def take(self, size: int, what: str) -> memoryview:
        end = self.offset + size
        if end > len(self.buffer):
            raise CheckpointError(
                f"{self.path}: the file is truncated or corrupt: {what} needs bytes {self.offset} "
                f"to {end}, but the file ends at {len(self.buffer)}"
            )
        piece = self.buffer[self.offset : end]
        self.offset = end
        return piece

    def integer(self, layout: str, what: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.integer("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not valid UTF-8") from None

    def value(self, value_type: int, key: str) -> Any:
        if value_type == STRING:
            return self.string(f"the value of {key!r}")
        if value_type == ARRAY:
            item_type = self.integer("<I", f"the item type of {key!r}")
            count = self.integer("<Q", f"the length of {key!r}")
            if item_type == STRING:
                return [self.string(f"an item of {key!r}") for _ in range(count)]
            return self.numbers(item_type, count, key).tolist()
        return self.numbers(value_type, 1, key).tolist()[0]

    def numbers(self, value_type: int, count: int, key: str) -> np.ndarray:
        dtype = SCALAR_DTYPES.get(value_type)
        if dtype is None:
            raise CheckpointError(f"{self.path}: {key!r} has unsupported value type {value_type}")
        return np.frombuffer(self.take(dtype.itemsize * count, f"the value of {key!r}"), dtype)

    def tensor_entry(self) -> _TensorEntry:
        name = self.string("a tensor name")
        what = f"the entry of tensor {name}"
        rank = self.integer("<I", what)
        if not 1 <= rank <= 4:
            raise CheckpointError(f"{self.path}: tensor {name} has {rank} dimensions")
        shape = struct.unpack(f"<{rank}Q", self.take(8 * rank, what))[::-1]
        if 0 in shape and math.prod(size or 1 for size in shape) > MOST_VALUES:
            raise CheckpointError(f"{self.path}: tensor {name} has the impossible shape {shape}")
        return _TensorEntry(name, shape, self.integer("<I", what), self.integer("<Q", what))


def _place_tensors(
    header: _Header, entries: list[_TensorEntry], data_start: int
) -> dict[str, GGUFTensor]:
    import gguf

    tensors: dict[str, GGUFTensor] = {}
    for entry in entries:
        if entry.name in tensors:
            raise CheckpointError(f"{header.path}: tensor {entry.name} appears twice")
        try:
            tensor_type = gguf.GGMLQuantizationType(entry.type_id)
        except ValueError:
            raise CheckpointError(
                f"{header.path}: tensor {entry.name} has unknown type {entry.type_id}"
            ) from None
        block_size, type_size = gguf.GGML_QUANT_SIZES[tensor_type]
        if entry.shape[-1] % block_size:
            raise CheckpointError(
                f"{header.path}: tensor {entry.name} has rows of {entry.shape[-1]}, not a multiple "
                f"of the block size {block_size} of {tensor_type.name}"
            )
        begin = header.offset = data_start + entry.offset
        size = math.prod(entry.shape) // block_size * type_size
        header.take(size, f"tensor {entry.name}")
        tensors[entry.name] = GGUFTensor(
            entry.name, entry.shape, tensor_type.name, header.mapping, begin, size
        )
    return tensors
