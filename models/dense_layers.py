"""Which layers of a model should read everything where the others choose, in a file.

A JSON object: `dense_layers`, numbers from 0, the one that minds most first; numbers out of the
embedding of the model that they were measured on; and whatever else its writer tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from models.decoder import Decoder
from models.errors import DenseLayersError
from models.signature import is_signature_of, signature_of
from models.sizes import MOST_LAYERS, is_size, shown
from models.text_files import write_whole

_LAYERS, _SIGNATURE, _NUMBERS = "dense_layers", "embedding_signature", 64


@dataclass(frozen=True)
class StoredDenseLayers:
    """What a file holds."""

    layers: tuple[int, ...]
    signature: Float32[np.ndarray, " numbers"]


def write_dense_layers(
    path: str | Path, layers: Sequence[int], model: Decoder, about: Mapping[str, Any]
) -> None:
    """Writes layers that were measured on `model`, and what else is known `about` them."""
    signature = [float(f"{one:.6g}") for one in signature_of(model, _NUMBERS)]
    content = {**about, _LAYERS: list(layers), _SIGNATURE: signature}
    write_whole(Path(path), json.dumps(content, indent=1) + "\n")


def load_dense_layers(path: str | Path, model: Decoder) -> tuple[int, ...]:
    """Those of a file, for this model.

    Raises:
      DenseLayersError: when they were measured on another, or the file cannot be used.
    """
    stored, number = read_dense_layers(path), model.cache_spec.num_layers
    if max(stored.layers, default=0) >= number:
        raise DenseLayersError(
            f"{path}: the layers are of another model: there is a layer {max(stored.layers)}, and "
            f"this model has {number} layers"
        )
    if not is_signature_of(stored.signature, model, _NUMBERS):
        raise DenseLayersError(
            f"{path}: the layers were measured on another model: its embedding is another"
        )
    return stored.layers


def read_dense_layers(path: str | Path) -> StoredDenseLayers:
    """What a file holds, whatever model it is of.

    Raises:
      DenseLayersError: when it is not there, or is not of dense layers.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DenseLayersError(
            f"no dense layers can be read from {path} ({error.strerror or error})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DenseLayersError(f"{path} has no dense layers: {error}") from error
    layers = content.get(_LAYERS) if isinstance(content, dict) else None
    if not isinstance(layers, list) or not all(
        is_size(one, least=0, most=MOST_LAYERS - 1) for one in layers
    ):
        raise DenseLayersError(
            f"{path}: {_LAYERS} must be a list of layers from 0, got {shown(layers)}"
        )
    try:
        signature = np.array(content.get(_SIGNATURE), np.float32)
    except (TypeError, ValueError):
        signature = np.array([])
    if signature.ndim != 1 or not signature.size or not np.isfinite(signature).all():
        raise DenseLayersError(f"{path}: {_SIGNATURE} must be a list of numbers")
    return StoredDenseLayers(tuple(layers), signature)
