"""The weights of a case: drawn by NumPy, from the tensor's name alone, the same everywhere."""

from __future__ import annotations

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32; scales of norms lie around one (around zero, plus one, in Gemma's), and all else is
    large enough that the layers matter to the logits."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    noise = random.standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        is_scale = name.endswith(".weight")
        return np.float32(0.3) * noise + np.float32(is_scale)
    spread = 1.0 if "embed" in name or "wte" in name or "wpe" in name else shape[-1] ** -0.5
    return np.float32(spread) * noise
