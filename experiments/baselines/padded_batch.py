"""Log-probabilities that can be differentiated without a tree: a batch of padded sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32, Int32

from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.training.token_tree import BLOCK_TOKENS  # as many logits as for a tree
from models.decoder import Decoder
from pallas_kernels.tree_attention import KEPT


def padded_log_probs(
    model: Decoder,
    params: Any,
    sequences: Int32[Array, "B T"],
    *,
    prompt: int,
    at_once: int = 1,
) -> Float32[Array, "B L"]:
    """Of the L tokens behind each sequence's `prompt` first.

    By `jax.nn.dot_product_attention`, for `at_once` sequences together; of a layer is kept what
    `tree_log_probs` keeps.
    """
    graphdef, _ = nnx.split(model)
    length = sequences.shape[1] - prompt
    blocks = -(-length // BLOCK_TOKENS)

    def of_one(sequence):
        own = nnx.merge(graphdef, params)
        own.remat = True
        positions = jnp.arange(len(sequence), dtype=jnp.int32)
        hidden, _ = own(sequence, positions, None, _attend(model.cache_spec))
        fill = blocks * BLOCK_TOKENS - length
        rows = jnp.pad(hidden[prompt - 1 : -1], ((0, fill), (0, 0)))
        targets = jnp.pad(sequence[prompt:], (0, fill))

        @jax.checkpoint
        def of_block(block):
            logits = own.logits(block[0])
            chosen = jnp.take_along_axis(logits, block[1][:, None], axis=1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, axis=1)

        cut = rows.reshape(blocks, BLOCK_TOKENS, -1), targets.reshape(blocks, BLOCK_TOKENS)
        return lax.map(of_block, cut).reshape(-1)[:length]

    return lax.map(of_one, sequences, batch_size=at_once if at_once > 1 else None)


def _attend(spec: CacheSpec):
    def attend(pool, layer, q, k, v):
        operands = (array[None] for array in (q, k, v))
        how = {"is_causal": True, "scale": spec.scale}
        output = jax.nn.dot_product_attention(*operands, **how)[0]
        return checkpoint_name(output, KEPT), pool

    return attend
