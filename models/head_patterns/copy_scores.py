"""Scores of KV heads by what they do when a model copies: one forward pass, no gradients.

Strings of random tokens are hidden in a text. Behind the text one of them begins again, and a head
that finds it attends to where it stood: the share of its attention that goes there is its score.
It is DuoAttention's observation of retrieval heads (arXiv 2410.10819, section 2.2) measured, in
place of its optimisation. Mass on far tokens of plain text will not do: on SmolLM2 with half of the
heads windowed it was worse than chance.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int, Int32

from jax_chunkattn.device.model_interface import Attend
from models.decoder import Decoder
from models.dense_attention import (
    attention_scores,
    attention_weights,
    dense_attend,
    empty_pool,
    visible_tokens,
)

_PIECE = 256  # tokens of the text that are read at once: attention's scores are in memory

Pool = tuple[jax.Array, jax.Array]


def copy_scores(
    model: Decoder,
    text: Int32[np.ndarray, " T"],
    strings: Int32[np.ndarray, "N S"],
    begins: Int[np.ndarray, " N"],
    *,
    shown: int,
) -> Float32[np.ndarray, "L Hkv"]:
    """The share of attention that each KV head's queries pay to a string which is to be copied.

    A mean over strings and over the tokens behind the first `shown` that a string begins with; the
    maximum over the query heads of a KV head, since all of them read what it keeps.

    Args:
      text: has each string in it.
      strings: each is read behind the text by itself, without its last token.
      begins: where in the text each stands.

    Raises:
      ValueError: for strings of no more than `shown` tokens, or one that is not where it should be.
    """
    length = strings.shape[1]
    if not 0 < shown < length:
        raise ValueError(f"of {length} tokens {shown} cannot be shown and others copied")
    for string, begin in zip(strings, begins.tolist(), strict=True):
        if begin < 0 or not np.array_equal(text[begin : begin + length], string):
            raise ValueError(f"a string does not stand at {begin} of the text")
    split = nnx.split(model)
    capacity = len(text) + length - 1
    dtype = jnp.result_type(*jax.tree.leaves(split[1]))
    pool = empty_pool(model.cache_spec, capacity, dtype)
    for begin in range(0, len(text), _PIECE):
        pool = _read(*split, pool, text[begin : begin + _PIECE], np.int32(begin))
    masses = [
        _mass(*split, pool, string[:-1], np.int32(len(text)), np.int32(begin), shown)
        for string, begin in zip(strings, begins, strict=True)
    ]
    of_heads = np.mean(masses, axis=0)  # [L, Hq]
    return of_heads.reshape(len(of_heads), model.cache_spec.num_kv_heads, -1).max(axis=2)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graphdef, state, pool: Pool, tokens: jax.Array, begin: jax.Array) -> Pool:
    model = nnx.merge(graphdef, state)
    positions = begin + jnp.arange(len(tokens), dtype=jnp.int32)
    _, pool = model(tokens, positions, pool, dense_attend(positions, model.cache_spec))
    return pool


@partial(jax.jit, static_argnums=(0, 6))
def _mass(graphdef, state, pool: Pool, tokens, end, begin, shown: int) -> jax.Array:
    """Of the attention that each query head pays, the share that goes to the string: `[L, Hq]`."""
    model = nnx.merge(graphdef, state)
    spec = model.cache_spec
    positions = end + jnp.arange(len(tokens), dtype=jnp.int32)
    key = jnp.arange(pool[0].shape[1], dtype=jnp.int32)
    inside = (key >= begin) & (key <= begin + len(tokens))
    dense = dense_attend(positions, spec)

    def attend(carried, layer, q, k, v):
        pool, masses = carried
        out, pool = dense(pool, layer, q, k, v)
        scores = attention_scores(spec, q, pool[0][layer])
        weights = attention_weights(scores, visible_tokens(spec, layer, positions, len(key)))
        mass = jnp.where(inside[None, None], weights[:, shown - 1 :], 0).sum(axis=2).mean(axis=1)
        return out, (pool, masses.at[layer].set(mass))

    recorded: Attend = attend
    masses = jnp.zeros((spec.num_layers, spec.num_heads), jnp.float32)
    _, (_, masses) = model(tokens, positions, (pool, masses), recorded)
    return masses
