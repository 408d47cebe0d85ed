"""Which layers of a model should read everything where the others choose, in a file.

The one that minds most comes first.
"""

from __future__ import annotations

from pathlib import Path

from models.decoder import Decoder
from models.errors import LayerFileError
from models.layer_file import LayerFile
from models.sizes import MOST_LAYERS

DENSE_LAYERS = LayerFile("dense_layers", "dense layers", range(MOST_LAYERS))


def load_dense_layers(path: str | Path, model: Decoder) -> tuple[int, ...]:
    """Those of a file, for this model.

    Raises:
      LayerFileError: when they were measured on another, or the file cannot be used.
    """
    layers, number = DENSE_LAYERS.read(path).values, model.cache_spec.num_layers
    if max(layers, default=0) >= number:
        raise LayerFileError(
            f"{path}: the layers are of another model: there is a layer {max(layers)}, and this "
            f"model has {number} layers"
        )
    return DENSE_LAYERS.load(path, model)
