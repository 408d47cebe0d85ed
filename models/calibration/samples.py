"""Keys and values that a model has of a text, to calibrate a codec with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float16, Float32, Int32

from models.config import DecoderConfig
from models.decoder import Decoder
from models.dense_attention import dense_attend, empty_pool
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.rotation import rotate_pairs


@dataclass(frozen=True)
class Samples:
    """Of some tokens of one text or several; keys as they are before they are rotated.

    Letters: L layers, S tokens, Hkv KV heads, D numbers of a head.
    """

    keys: Float16[np.ndarray, "L S Hkv D"]
    values: Float16[np.ndarray, "L S Hkv D"]
    positions: Int32[np.ndarray, " S"]  # of each token in its text

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """All tokens of several samples."""
        return cls(
            np.concatenate([part.keys for part in parts], axis=1),
            np.concatenate([part.values for part in parts], axis=1),
            np.concatenate([part.positions for part in parts]),
        )

    def rotated_keys(
        self, frequencies: Float32[np.ndarray, "L pairs"]
    ) -> Float16[np.ndarray, "L S Hkv D"]:
        """As attention reads them."""
        return np.asarray(_halved(_turned(self.keys, self.positions, frequencies)))


def key_frequencies(config: DecoderConfig) -> Float32[np.ndarray, "L pairs"]:
    """Radians a token that pairs of a key's dimensions turn by in each layer; no pairs where none
    do."""
    tables = config.rotary_tables
    if tables is None:
        return np.zeros((config.num_layers, 0), np.float32)
    return tables.frequencies[list(tables.kind)]


def sample(model: Decoder, tokens: Int32[np.ndarray, " T"], stride: int) -> Samples:
    """Of the first token of a text and every `stride`-th behind it.

    The text is read in one pass of dense attention, as the model was trained.
    """
    keys, values = _keys_and_values(*nnx.split(model), tokens, stride)
    positions = np.arange(0, len(tokens), stride, dtype=np.int32)
    return Samples(np.asarray(keys), np.asarray(values), positions)


@partial(jax.jit, static_argnums=(0, 3))
def _keys_and_values(graphdef, state, tokens, stride: int) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    spec, positions = model.cache_spec, jnp.arange(len(tokens), dtype=jnp.int32)
    attend = dense_attend(positions, spec)
    dtype = jnp.result_type(*jax.tree.leaves(state))
    _, pools = model(tokens, positions, empty_pool(spec, len(tokens), dtype), attend)
    keys, values = (pool[:, ::stride].astype(jnp.float32) for pool in pools)
    frequencies = key_frequencies(model.config)
    return _halved(_turned(keys, -positions[::stride], frequencies)), _halved(values)


def _halved(numbers: Float32[jax.Array, "*shape"]) -> Float16[jax.Array, "*shape"]:
    """In float16, as its largest what is beyond."""
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(numbers, -most, most).astype(jnp.float16)


def _turned(
    keys: Float[HostOrDevice, "L S Hkv D"],
    positions: Int32[HostOrDevice, " S"],
    frequencies: Float32[np.ndarray, "L pairs"],
) -> Float32[jax.Array, "L S Hkv D"]:
    """As they are at these positions; negative ones turn back."""
    places = jnp.asarray(positions, jnp.float32)
    angles = places[None, :, None, None] * jnp.asarray(frequencies)[:, None, None]
    return rotate_pairs(jnp.asarray(keys, jnp.float32), jnp.cos(angles), jnp.sin(angles))
