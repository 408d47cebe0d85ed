"""The sources of a decoder: a folder, a GGUF file, a repository on the hub, or random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.building import Fill
from models.checkpoint import checkpoint_fill
from models.config import DecoderConfig
from models.errors import CheckpointError
from models.gguf_config import gguf_architecture, hf_words
from models.gguf_file import read_gguf
from models.hf_config import find_architecture, read_config
from models.hub import fetch_repository, is_repository_name
from models.presets import preset
from models.random_weights import random_fill
from models.safetensors_folder import read_folder, read_json, weight_files

if TYPE_CHECKING:
    from models.tokenizer import ChatTokenizer

RANDOM_PREFIX = "random:"
CONFIG = "config.json"
_WORDS = ("*.json", "*.jinja", "*/*.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A decoder's config, and functions that read its weights and tokenizer.

    Attributes:
      name: as shown to the user.
      fill: checks that all weights are there, and returns the function that writes them.
    """

    name: str
    config: DecoderConfig
    fill: Callable[[], Fill]
    tokenizer: Callable[[], ChatTokenizer | None]


def random_checkpoint(spec: str, seed: int, max_positions: int | None) -> Checkpoint:
    """Random weights of the preset that `spec` names."""
    config = preset(spec.removeprefix(RANDOM_PREFIX))
    if max_positions is not None:
        config = replace(config, max_positions=max_positions)
    return Checkpoint(spec, config, lambda: random_fill(config, seed), lambda: None)


def open_checkpoint(spec: str | Path, max_positions: int | None) -> Checkpoint:
    """The checkpoint at a path, or of a repository on the hub. Raises as `models.load`."""
    path = Path(spec).expanduser()
    if path.exists():
        return _open_path(path, max_positions)
    if not (isinstance(spec, str) and is_repository_name(spec)):
        raise FileNotFoundError(
            f"no such file or folder: {spec}; expected a GGUF file, a folder with {CONFIG} and "
            f"*.safetensors, ORG/NAME on the Hugging Face hub, or {RANDOM_PREFIX}PRESET"
        )
    return replace(_open_path(fetch_repository(spec), max_positions), name=spec)


def checkpoint_files(path: Path) -> list[Path]:
    """The files that `models.load` may read at a path; weights come last.

    All JSON files and templates of a folder are listed, whether they are read or not.
    """
    if path.is_file() and path.suffix == ".gguf":
        return [path]
    folder = path if path.is_dir() else path.parent
    words = [file for pattern in _WORDS for file in sorted(folder.glob(pattern))]
    try:
        weights = weight_files(path)
    except CheckpointError:  # loading says what is wrong
        weights = []
    return [file for file in (*words, *weights) if file.is_file()]


def _open_path(path: Path, max_positions: int | None) -> Checkpoint:
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path, max_positions)
    return _open_folder(path, max_positions)


def _open_gguf(path: Path, max_positions: int | None) -> Checkpoint:
    from models.gguf_tokenizer import read_gguf_tokenizer

    file = read_gguf(path)
    architecture, layout = gguf_architecture(file)
    config = read_config(hf_words(file), architecture, path, max_positions)
    return Checkpoint(
        path.stem,
        config,
        lambda: checkpoint_fill(file, layout, config),
        lambda: read_gguf_tokenizer(file),
    )


def _open_folder(path: Path, max_positions: int | None) -> Checkpoint:
    from models.tokenizer_folder import read_tokenizer_folder

    folder = path if path.is_dir() else path.parent
    where = folder / CONFIG
    if not where.is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG}; expected a folder with {CONFIG} and *.safetensors, as Hugging "
            "Face's checkpoints have"
        )
    words = read_json(where)
    architecture = find_architecture(words, where)
    config = read_config(words, architecture, where, max_positions)
    return Checkpoint(
        folder.resolve().name,
        config,
        lambda: checkpoint_fill(read_folder(path), architecture.layout, config),
        lambda: read_tokenizer_folder(folder),
    )
