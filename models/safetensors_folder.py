"""Reads the weights of a Hugging Face checkpoint: a folder of .safetensors files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CheckpointError
from models.messages import listed
from models.safetensors_file import LFS_POINTER, StoredTensor, read_tensors, refuse_lfs_pointer

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of all shards; implements `models.tensors.Tensors`.

    `path` is the folder. Values come in the dtype stored: float32, float16, bfloat16 or float64.
    """

    path: Path
    stored: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def total_bytes(self) -> int:
        return sum(tensor.size for tensor in self.stored.values())

    @contextlib.contextmanager
    def tensor(self, name: str) -> Iterator[np.ndarray]:
        with self.stored[name].values() as values:
            yield values


def read_folder(path: str | Path) -> SafetensorsFolder:
    """The tensors of the checkpoint at `path`; only headers are read.

    `path` is a folder with `model.safetensors`, or with `model.safetensors.index.json` and the
    shards it names, or with one other .safetensors file; or it is one such file. A shard stands for
    the whole checkpoint that its index describes. With an index, exactly the tensors it names are
    there.

    Raises FileNotFoundError when there is nothing at `path`, and CheckpointError, which names the
    file, when there are no weights or they are pickled, incomplete, damaged or of an unsupported
    type.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: {_no_pickles(path.parent)}")
    index = path.parent / INDEX
    if index.is_file() and path.name in _weight_map(index).values():
        return _of_index(index)
    return SafetensorsFolder(path.parent, read_tensors(path))


def weight_files(path: Path) -> list[Path]:
    """The files that `read_folder` reads at `path`; raises CheckpointError when it is not clear."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (folder / SINGLE).exists():
        return [folder / SINGLE]
    shards = sorted(set(_weight_map(folder / INDEX).values())) if (folder / INDEX).exists() else []
    if shards and (path.is_dir() or path.name in shards):
        return [folder / shard for shard in shards]
    return [_only_weights(folder) if path.is_dir() else path]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises CheckpointError when it is missing, or holds none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    refuse_lfs_pointer(path, content[: len(LFS_POINTER)])
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _of_folder(folder: Path) -> SafetensorsFolder:
    if (folder / SINGLE).exists():
        return SafetensorsFolder(folder, read_tensors(folder / SINGLE))
    if (folder / INDEX).exists():
        return _of_index(folder / INDEX)
    return SafetensorsFolder(folder, read_tensors(_only_weights(folder)))


def _only_weights(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir())
    weights = [name for name in names if name.endswith(SUFFIX)]
    if len(weights) != 1 or SHARD_NAME.search(weights[0]):
        raise CheckpointError(f"{folder}: {_why_no_weights(folder, names, weights)}")
    return folder / weights[0]


def _of_index(index: Path) -> SafetensorsFolder:
    folder, weight_map = index.parent, _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: only {len(shards) - len(missing)} of {len(shards)} shards are there; "
            f"download what is missing: {listed(missing)}"
        )
    tensors = {shard: read_tensors(folder / shard) for shard in shards}
    for shard in shards:
        lacking = [
            name for name, at in weight_map.items() if at == shard and name not in tensors[shard]
        ]
        if lacking:
            raise CheckpointError(
                f"{folder / shard}: tensors are missing that {INDEX} says it holds: "
                f"{listed(lacking)}; download both again"
            )
    return SafetensorsFolder(folder, {name: tensors[at][name] for name, at in weight_map.items()})


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which tensor; a shard is a file beside the index, and not elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name} is in {shard!r}, which is no file name")
    return weight_map


def _why_no_weights(folder: Path, names: Sequence[str], weights: Sequence[str]) -> str:
    if any(SHARD_NAME.search(name) for name in weights):
        return f"{_count(weights, 'shard')} of a checkpoint, and no {INDEX}; download that too"
    if weights:
        return (
            f"{_count(weights, 'safetensors file')} ({listed(weights)}), neither {SINGLE} nor "
            f"{INDEX}; pass the path of one of them"
        )
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return f"only {listed(pickles)}; {_no_pickles(folder)}"
    if quantised := [name for name in names if name.endswith(".gguf")]:
        return f"no {SINGLE}, but GGUF; pass the path of a file: {listed(quantised)}"
    return f"no weights: expected {SINGLE}, or {INDEX} and its shards; it has " + (
        listed(names) if names else "no files at all"
    )


def _no_pickles(folder: Path) -> str:
    return (
        "pickled weights are never loaded, because that can run code; convert with transformers' "
        f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')"
    )


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}" + "s" * (len(names) != 1)
