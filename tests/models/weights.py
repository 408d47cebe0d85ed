"""Decoders with given weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from models.building import build
from models.config import DecoderConfig
from models.decoder import Decoder
from models.random_weights import random_fill
from models.weights import BLOCKS, decoder_weights


def decoder_of(
    config: DecoderConfig, weights: Mapping[str, np.ndarray], dtype: str = "float32", **options
) -> Decoder:
    """The decoder whose weights are these, by name; those of the layers are stacked."""

    def fill(name: str, layer: int | None, out: np.ndarray) -> None:
        out[...] = weights[name] if layer is None else weights[BLOCKS + name][layer]

    return build(config, dtype, fill, **options)


def random_weights(config: DecoderConfig, seed: int) -> dict[str, np.ndarray]:
    """Random weights by name in float32, those of the layers stacked."""
    fill = random_fill(config, seed)
    weights = {}
    for name, weight in decoder_weights(config).by_name().items():
        weights[name] = np.empty(weight.shape, np.float32)
        if not name.startswith(BLOCKS):
            fill(name, None, weights[name])
            continue
        for layer in range(config.num_layers):
            fill(name.removeprefix(BLOCKS), layer, weights[name][layer])
    return weights
