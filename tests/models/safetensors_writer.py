"""Writes .safetensors files, good ones and ones whose header says what the test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "bool": "BOOL",
}


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The header of a file that holds `tensors` one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    return header


def write_raw(path: Path, header: bytes, data: bytes) -> Path:
    """Write a file of a header, right or wrong, and data."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], *, padding: int = 0, **changes: Any
) -> Path:
    """Write `tensors`; `changes` replace entries of the header, or drop those set to None."""
    header = header_of(tensors) | changes
    raw = json.dumps({name: entry for name, entry in header.items() if entry is not None}).encode()
    return write_raw(path, raw + b" " * padding, b"".join(t.tobytes() for t in tensors.values()))


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """Write shards by file name, and their index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, tensors in shards.items():
        write_safetensors(folder / file_name, tensors)
    write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
