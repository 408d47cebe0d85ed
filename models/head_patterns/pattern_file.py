"""A head pattern in a folder, as DuoAttention publishes them.

`full_attention_heads.tsv` has a row for each layer and a column for each KV head, and `config.json`
`sink_size` and `recent_size` beside whatever else. Ours say too which model they were made for.
(https://github.com/mit-han-lab/duo-attention, `attn_patterns`.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from models.decoder import Decoder
from models.errors import HeadPatternError
from models.head_patterns.pattern import HeadPattern
from models.signature import is_signature_of, signature_of
from models.sizes import is_size, shown
from models.whole_files import write_whole
from pallas_kernels.windows import FAR

TABLE, CONFIG = "full_attention_heads.tsv", "config.json"
_SIGNATURE, _NUMBERS = "embedding_signature", 64
_BEYOND = 0.05
"""How far published gates may be outside [0, 1], to be taken for 0 or 1: their last update was not
clipped."""


@dataclass(frozen=True)
class StoredPattern:
    """What a folder holds.

    Attributes:
      signature: numbers out of the embedding of the model that it was made for; None in published
        ones.
    """

    pattern: HeadPattern
    signature: Float32[np.ndarray, " numbers"] | None


def pattern_files(path: str | Path) -> tuple[Path, Path]:
    """The two files of the pattern in a folder, or of the pattern whose table `path` is."""
    path = Path(path)
    folder = path.parent if path.name == TABLE else path
    return folder / TABLE, folder / CONFIG


def write_pattern(
    folder: str | Path, pattern: HeadPattern, model: Decoder, about: Mapping[str, Any]
) -> None:
    """Writes a pattern that was made for `model`, and `about` into its configuration.

    The folder is made if it is not there. The table is written last, as a whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **about,
        "sink_size": pattern.sinks,
        "recent_size": pattern.recent,
        _SIGNATURE: [float(f"{one:.6g}") for one in signature_of(model, _NUMBERS)],
    }
    rows = ["\t".join(repr(one) for one in layer) for layer in pattern.scores]
    table_file, config_file = pattern_files(folder)
    write_whole(config_file, json.dumps(config, indent=1) + "\n")
    write_whole(table_file, "\n".join(rows) + "\n")


def load_pattern(path: str | Path, model: Decoder) -> HeadPattern:
    """The pattern of a folder, for this model.

    Published ones are known by their layers and KV heads alone.

    Raises:
      HeadPatternError: when it was made for another, or the files cannot be used.
    """
    stored = read_pattern(path)
    try:
        stored.pattern.check_shape(model.cache_spec)
    except HeadPatternError as error:
        raise HeadPatternError(f"{path}: {error}") from None
    if stored.signature is not None and not is_signature_of(stored.signature, model, _NUMBERS):
        raise HeadPatternError(
            f"{path}: the pattern was made for another model of the same sizes: its embedding is "
            "another"
        )
    return stored.pattern


def read_pattern(path: str | Path) -> StoredPattern:
    """What a folder, or the one that a table is in, holds, whatever model it was made for.

    Raises:
      HeadPatternError: when a file is not there, or is not of a pattern.
    """
    table_file, config_file = pattern_files(path)
    try:
        lines = table_file.read_text(encoding="utf-8").splitlines()
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeadPatternError(
            f"no head pattern can be read from {error.filename or path} "
            f"({error.strerror or error}): it is a folder with {TABLE} and {CONFIG}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise HeadPatternError(f"{path} has no head pattern: {error}") from error
    try:
        if not isinstance(config, dict):
            raise HeadPatternError(f"{CONFIG} is not an object")
        sinks, recent = (_size(config, name) for name in ("sink_size", "recent_size"))
        pattern = HeadPattern.of([_row(*line) for line in enumerate(lines, start=1)], sinks, recent)
        return StoredPattern(pattern, _signature(config))
    except HeadPatternError as error:
        raise HeadPatternError(f"{path} has no head pattern: {error}") from None


def _row(number: int, line: str) -> list[float]:
    try:
        gates = [float(field) for field in line.split("\t")]
    except ValueError:
        gates = [math.nan]
    if not all(-_BEYOND <= gate <= 1 + _BEYOND for gate in gates):
        raise HeadPatternError(
            f"line {number} of {TABLE} must be numbers from 0 to 1 between tabs, got {line[:40]!r}"
        )
    return [min(max(gate, 0.0), 1.0) for gate in gates]


def _size(config: Mapping[str, Any], name: str) -> int:
    size = config.get(name)
    if not is_size(size, least=0, most=FAR):
        raise HeadPatternError(f"{name} of {CONFIG} must be a number of tokens, got {shown(size)}")
    return size


def _signature(config: Mapping[str, Any]) -> np.ndarray | None:
    if _SIGNATURE not in config:
        return None
    try:
        numbers = np.array(config[_SIGNATURE], np.float32)
    except (TypeError, ValueError):
        numbers = np.array([])
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise HeadPatternError(f"{_SIGNATURE} of {CONFIG} must be a list of numbers")
    return numbers
