"""Random weights, drawn by NumPy: on a CPU quicker than by jax.random."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from models.building import THREADS, Fill
from models.config import DecoderConfig
from models.weights import block_weights, decoder_weights

MOST_PARTS = 64  # into which an array is split


def random_fill(config: DecoderConfig, seed: int) -> Fill:
    """Writes normal weights of variance 1 / fan-in, norms of one and biases of zero.

    They depend on the seed alone, not on the number of threads or on how the layers are stored:
    arrays are drawn in parts, each from its own generator.
    """
    weights = decoder_weights(config).by_name()
    layers = block_weights(config).by_name()
    index = {name: number for number, name in enumerate([*weights, *layers])}

    def fill(name: str, layer: int | None, out: np.ndarray) -> None:
        weight = weights[name] if layer is None else layers[name]
        if not weight.stddev:
            out[...] = weight.mean
            return

        def draw(part: tuple[int, np.ndarray]) -> None:
            number, values = part
            generator = np.random.default_rng([seed, index[name], layer or 0, number])
            values[...] = generator.standard_normal(values.shape, np.float32) * weight.stddev

        parts = enumerate(np.array_split(out, min(MOST_PARTS, len(out))))
        if layer is None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(draw, parts))
        else:  # other threads draw other layers
            list(map(draw, parts))

    return fill
