"""What tells a model's weights from another's: numbers out of its embedding.

Files that are made for a model keep them, and are refused for another of the same sizes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from models.decoder import Decoder

_NUMBERS = 1024
_SAME = 0.01
"""How far the embeddings of one model may be apart, relatively: bfloat16 is off by 0.002."""


def signature_of(model: Decoder, numbers: int = _NUMBERS) -> Float32[np.ndarray, " numbers"]:
    """So many numbers out of the embedding, from all of it, or all of a smaller one."""
    embedding = model.embedding[...]
    count = min(numbers, embedding.size)
    places = np.linspace(0, embedding.size - 1, count).astype(np.int64)
    rows, columns = np.divmod(places, embedding.shape[1])
    return np.asarray(embedding[rows, columns].astype(jnp.float32))


def is_signature_of(
    signature: Float32[np.ndarray, " numbers"], model: Decoder, numbers: int = _NUMBERS
) -> bool:
    """Whether a signature of so many numbers is this model's, whatever dtype either has."""
    own = signature_of(model, numbers)
    if own.shape != signature.shape:
        return False
    return bool(np.linalg.norm(own - signature) <= _SAME * np.linalg.norm(own))
