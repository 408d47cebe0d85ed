"""The weights of a case: drawn by NumPy, from the tensor's name alone, the same everywhere."""

from __future__ import annotations

import zlib

import numpy as np

EMBEDDING_SPREAD = 0.15
"""Small beside what layers add: where the embedding is also the unembedding, a token would else be
followed by itself for ever, and greedy tokens would prove nothing."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32: scales of norms lie around one, biases around zero, projections keep variance.

    A checkpoint may leave out the name of the model inside the model.
    """
    name = name.removeprefix("model.").removeprefix("transformer.")
    random = np.random.default_rng(zlib.crc32(name.encode()))
    noise = random.standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return np.float32(0.3) * noise + np.float32(name.endswith(".weight"))
    if any(part in name for part in ("embed_tokens", "wte")):
        return np.float32(EMBEDDING_SPREAD) * noise
    is_position = any(part in name for part in ("embed_positions", "wpe"))
    return np.float32(1.0 if is_position else shape[-1] ** -0.5) * noise
