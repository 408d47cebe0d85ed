"""Encoded keys and values as KIVI and KVQuant read them, wherever chunks end.

KIVI (arXiv 2402.02750, section 3.2 and algorithm 1) keeps a residual of recent tokens: keys in
full precision until a whole block of R of them is there, the last R values always. So what a token
reads depends on how far back it looks, and not on where chunks begin; a chunk would have to be kept
both exact and encoded to be shared. KVQuant (arXiv 2401.18079, section 3) has no residual: a token
reads even itself encoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jax_chunkattn.device.model_interface import Attend, CacheSpec
from models import Decoder
from models.dense_attention import visible_tokens
from pallas_kernels.codecs import ChunkCodec, ChunkContext, TensorCodec, spread
from pallas_kernels.softcap import cap_scores

KIVI_WINDOW = 128
"""R of KIVI's experiments."""


def hidden_states(
    model: Decoder, tokens: Int32[Array, " T"], codec: ChunkCodec, *, chunk_size: int, window: int
) -> Float32[Array, "T M"]:
    """What the model makes of each token before its logits, M wide; groups as `chunk_size` has
    them.

    Args:
      window: R; 0 for no residual.
    """
    return _hidden_states(*nnx.split(model), tokens, codec, chunk_size, window)


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _hidden_states(graphdef, state, tokens, codec: ChunkCodec, chunk_size: int, window: int):
    model = nnx.merge(graphdef, state)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    attend = residual_attend(model.cache_spec, positions, codec, chunk_size, window)
    return model(tokens, positions, None, attend)[0].astype(jnp.float32)


def residual_attend(
    spec: CacheSpec, positions: Int32[Array, " T"], codec: ChunkCodec, chunk_size: int, window: int
) -> Attend:
    """Causal attention of a whole sequence, with nothing kept."""
    query, key = positions[:, None], positions[None]
    exact_keys = key >= query // window * window if window else key > query
    exact_values = key > query - window
    known = codec.constants

    def attend(pool, layer, q, k, v):
        scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
        group = spec.num_heads // spec.num_kv_heads

        def scores(keys):
            wide = jnp.repeat(keys, group, axis=1)
            return jnp.einsum("thd,shd->hts", q * scale, wide, precision="highest")

        def sums(where, values):
            wide = jnp.repeat(values, group, axis=1)
            kept = jnp.where(where[None], weights, 0)
            return jnp.einsum("hts,shd->thd", kept, wide, precision="highest")

        encoded = scores(_as_read(codec.keys, known.keys, layer, k, chunk_size))
        both = cap_scores(jnp.where(exact_keys[None], scores(k), encoded), spec.softcap)
        seen = jnp.repeat(visible_tokens(spec, layer, positions, len(positions)), group, axis=0)
        weights = jax.nn.softmax(jnp.where(seen, both, -jnp.inf))
        encoded = sums(~exact_values, _as_read(codec.values, known.values, layer, v, chunk_size))
        return sums(exact_values, v) + encoded, pool

    return attend


def _as_read(
    codec: TensorCodec,
    constants: Mapping[str, np.ndarray],
    layer: Int32[Array, ""],
    numbers: Float[Array, "T Hkv D"],
    chunk_size: int,
) -> Float32[Array, "T Hkv D"]:
    """What the numbers are when they have been encoded; a last chunk that is not full is not
    read so."""
    length = len(numbers)
    padded = jnp.pad(numbers, ((0, -length % chunk_size), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(-1, chunk_size, *numbers.shape[1:]), 2, 1)
    count, kv_heads = chunks.shape[:2]
    begin = jnp.arange(count, dtype=jnp.int32)[:, None] * chunk_size
    of_layer = {name: jnp.asarray(array)[layer] for name, array in constants.items()}
    known = spread(of_layer, (1, kv_heads))
    context = ChunkContext(jnp.broadcast_to(begin, (count, kv_heads)), known)
    decoded = codec.decode(codec.encode(chunks, context), known)
    return jnp.moveaxis(decoded, 1, 2).reshape(padded.shape)[:length]
