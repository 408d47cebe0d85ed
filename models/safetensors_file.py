"""One .safetensors file: an 8-byte length, a JSON header, and the tensors' bytes.

The `safetensors` package is not used for the memory it holds. Of a 1.2 GB checkpoint whose largest
tensor has 96 MiB, read tensor by tensor, safetensors 0.8.0 left 1,216 MiB resident with a handle
kept for each file, and 192 MiB with a handle for each tensor: the mapped pages and a copy. Here a
tensor is a view of mapped pages that are given back when it has been read.

Format: docs of huggingface/safetensors, "Format". All of a header is checked against the file
before any tensor is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from models.errors import CheckpointError
from models.sizes import is_size
from models.tensors import drop_pages
from models.whole_files import whole_file

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
MOST_DIMENSIONS = 64  # of NumPy's arrays
MOST_NUMBER = 2**100  # of a shape or an offset; Python refuses to write very many digits
MOST_VALUES = 2**59  # of a tensor; NumPy counts so where a dimension is 0
LFS_POINTER = b"version https://git-lfs"
FLOATING = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
OTHER_ITEM_BYTES = {
    "BOOL": 1,
    "I8": 1,
    "U8": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
}
"""Types of buffers, which a checkpoint may hold beside its weights; listed, and never read."""


class FileState(NamedTuple):
    """What tells a file from one that takes its place."""

    inode: int
    changed: int
    size: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileState:
        """As it is now."""
        found = os.fstat(file.fileno())
        return cls(found.st_ino, found.st_mtime_ns, found.st_size)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its file: `size` bytes from byte `begin` of the file on."""

    path: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    size: int
    state: FileState

    @contextlib.contextmanager
    def values(self) -> Iterator[np.ndarray]:
        """The values in the dtype stored, read-only, mapped while in the context.

        An array kept for longer stays valid, and is read from the file again.
        """
        dtype = FLOATING.get(self.dtype_name)
        if dtype is None:
            raise CheckpointError(_unsupported(self.path, self.name, self.dtype_name))
        if not self.size:
            yield np.empty(self.shape, dtype)
            return
        skipped = self.begin % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            if FileState.of(file) != self.state:
                raise CheckpointError(f"{self.path}: the file has changed since it was opened")
            mapping = mmap.mmap(
                file.fileno(),
                skipped + self.size,
                access=mmap.ACCESS_READ,
                offset=self.begin - skipped,
            )
        try:
            flat = np.frombuffer(mapping, dtype, self.size // dtype.itemsize, skipped)
            yield flat.reshape(self.shape)
        finally:
            drop_pages(mapping, 0, len(mapping))


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by name, in the header's order; no values are read.

    Raises CheckpointError when the file is missing, cut short, contradicts itself, or holds floats
    of a type that cannot be read.
    """
    header, data_begin, state = _read_header(path)
    data_bytes = state.size - data_begin
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _stored(path, name, entry, data_begin, state)
    end = max((tensor.begin + tensor.size for tensor in tensors.values()), default=data_begin)
    if end > data_begin + data_bytes:
        raise CheckpointError(
            f"{path}: the file is truncated: it has {data_begin + data_bytes} bytes of {end}; "
            "download it again"
        )
    _check_cover(path, tensors, data_begin, data_begin + data_bytes)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What the header says beside its tensors; {} for nothing.

    Raises CheckpointError as `read_tensors`.
    """
    header, _, _ = _read_header(path)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise CheckpointError(f"{path}: corrupt header: its metadata are no texts by name")
    return metadata


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a file of float32 tensors: all of it, or what was there before stays."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in tensors.items()}
    for name, array in arrays.items():
        offsets = [begin, begin + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        begin += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # tensors begin at a multiple, for mapping
    with whole_file(path) as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes())


def refuse_lfs_pointer(path: Path, begin: bytes) -> None:
    """Raises CheckpointError when a file that begins with `begin` stands in for one in Git LFS."""
    if begin.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer and not the file itself; run `git lfs pull` in "
            "its folder"
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int, FileState]:
    """The header, where the data begins, and the file's state."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        state = FileState.of(file)
        total = state.size
        first = file.read(LENGTH_BYTES)
        refuse_lfs_pointer(path, first + file.read(len(LFS_POINTER)))
        length = int.from_bytes(first, "little")
        if length > MOST_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: not a safetensors file: its header would have {length} bytes, and "
                f"{MOST_HEADER_BYTES} is the limit"
            )
        if LENGTH_BYTES + length > total:
            raise CheckpointError(
                f"{path}: the file is truncated: it has {total} bytes, and its header alone needs "
                f"{LENGTH_BYTES + length}; download it again"
            )
        file.seek(LENGTH_BYTES)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or a corrupt one: its header is not JSON ({error})"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object")
    return header, LENGTH_BYTES + length, state


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found


def _stored(path: Path, name: str, entry: Any, data_begin: int, state: FileState) -> StoredTensor:
    """The tensor that one entry of the header describes."""
    senseless = CheckpointError(
        f"{path}: corrupt header: the entry of tensor {name} makes no sense"
    )
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise senseless from None
    if not isinstance(dtype_name, str) or len(numbers) > MOST_DIMENSIONS + 2:
        raise senseless
    if not all(is_size(number, least=0, most=MOST_NUMBER) for number in numbers):
        raise senseless
    if dtype_name in FLOATING:
        item_bytes = FLOATING[dtype_name].itemsize
    elif dtype_name in OTHER_ITEM_BYTES:
        item_bytes = OTHER_ITEM_BYTES[dtype_name]
    else:
        raise CheckpointError(_unsupported(path, name, dtype_name))
    if 0 in shape and math.prod(number or 1 for number in shape) > MOST_VALUES:
        raise senseless
    if end - begin != math.prod(shape) * item_bytes:
        raise CheckpointError(
            f"{path}: corrupt header: tensor {name} is {dtype_name} of shape {tuple(shape)} and "
            f"has {end - begin} bytes"
        )
    begin, size = data_begin + begin, end - begin
    return StoredTensor(path, name, dtype_name, tuple(shape), begin, size, state)


def _check_cover(path: Path, tensors: dict[str, StoredTensor], begin: int, end: int) -> None:
    """Refuse tensors that overlap, and bytes that belong to none."""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.size)):
        if tensor.begin != begin:
            what = "overlaps the one before" if tensor.begin < begin else "does not follow on"
            raise CheckpointError(f"{path}: corrupt header: tensor {tensor.name} {what}")
        begin += tensor.size
    if begin < end:
        raise CheckpointError(f"{path}: corrupt file: {end - begin} bytes belong to no tensor")


def _unsupported(path: Path, name: str, dtype_name: str) -> str:
    return (
        f"{path}: tensor {name} is stored as {dtype_name}; only {', '.join(FLOATING)} can be "
        "loaded, and quantised checkpoints such as FP8 are not supported"
    )
