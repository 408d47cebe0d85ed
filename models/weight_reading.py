"""The weights of a checkpoint one by one, for a model that is there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.building import Fill, aligned_empty
from models.loading import DTYPES
from models.sources import open_checkpoint
from models.weights import BLOCKS, Weight, decoder_weights


@dataclass(frozen=True)
class StoredWeight:
    """An array that is read each time NumPy is asked to make one of it, and kept by nobody."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stored weight is read into a new array, it cannot be shared")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def stored_weights(
    spec: str | Path,
    *,
    dtype: str = "float32",
    unroll: bool = False,
    max_positions: int | None = None,
) -> dict[str, Any]:
    """The weights of a checkpoint, by the paths of a decoder's, none of them read yet.

    For `Engine.update_weights`, which reads one after another: there is one array of them in memory
    beside the model's, where `load` makes a whole second model.

    Args:
      spec, dtype, unroll, max_positions: as for `load`.

    Raises:
      ValueError, FileNotFoundError, CheckpointError, DownloadError: as `load`. That a file cannot
        be read, or has changed since, is found when it is: `update_weights` then raises, and from
        the second array on closes the engine, whose weights are neither old nor new.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(spec, max_positions)
    fill = checkpoint.fill()
    found: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    for name, weight in decoder_weights(checkpoint.config).by_name().items():
        short = name.removeprefix(BLOCKS)
        if name == short:
            found[name] = _stored(fill, name, weight, dtype, None)
        elif not unroll:
            blocks[short] = _stored(fill, short, weight, dtype, range(checkpoint.config.num_layers))
        else:
            for layer in range(checkpoint.config.num_layers):
                own = _stored(fill, short, weight.unstacked(), dtype, layer)
                blocks.setdefault(str(layer), {})[short] = own
    return found | {"blocks": blocks}


def _stored(
    fill: Fill, name: str, weight: Weight, dtype: str, layers: range | int | None
) -> StoredWeight:
    kind = weight.dtype(dtype)
    read = partial(_read, fill, name, weight.shape, kind, layers)
    return StoredWeight(weight.shape, jnp.dtype(kind), read)


def _read(
    fill: Fill, name: str, shape: tuple[int, ...], dtype: str, layers: range | int | None
) -> np.ndarray:
    array = aligned_empty(shape, dtype)
    if isinstance(layers, range):
        for layer in layers:
            fill(name, layer, array[layer])
    else:
        fill(name, layers, array)
    return array
