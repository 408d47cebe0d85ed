"""How likely a model finds tokens that are given, on the device.

Letters: T tokens of a prefill call, E hidden size, V vocabulary, L `MAX_LOGPROBS`.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.model_interface import DecoderModel
from jax_chunkattn.planning.scored_tokens import ScoredTokens
from jax_chunkattn.sampling import Logprobs, log_probabilities
from jax_chunkattn.sampling.row_sums import IN_XLA, RowSums
from pallas_kernels.plans import HostOrDevice

BLOCK_TOKENS = 64
"""Tokens whose logits are there at once: 12 MB of them for a vocabulary of 49,152."""


def score_tokens(
    model: DecoderModel,
    hidden: Float[Array, "T E"],
    scored: ScoredTokens,
    *,
    row_sums: RowSums = IN_XLA,
) -> Logprobs:
    """Of each scored token, in their order, its log-probability and those of the likeliest: [T].

    The logits are computed a block at a time and given up; blocks without a token cost nothing.
    Where the largest logit is no finite number the log-probability is NaN.
    """
    num_tokens = len(hidden)
    block = min(BLOCK_TOKENS, num_tokens)

    def score(part: ScoredTokens) -> Logprobs:
        logits = model.logits(jnp.take(hidden, part.places, axis=0, mode="clip"))
        targets = jnp.asarray(part.targets)
        found = log_probabilities(logits, targets, part.top, row_sums=row_sums)
        finite = jnp.isfinite(jnp.max(logits, axis=-1))
        return replace(found, chosen=jnp.where(finite, found.chosen, jnp.nan))

    def score_some(part: ScoredTokens) -> Logprobs:
        some = jnp.any(part.places < num_tokens)
        return lax.cond(some, score, lambda _: Logprobs.empty(block), part)

    def in_blocks(values: Int32[HostOrDevice, " T"]) -> Int32[Array, "M N"]:
        return jnp.asarray(values).reshape(-1, block)

    found = lax.map(score_some, jax.tree.map(in_blocks, scored))
    return jax.tree.map(lambda values: values.reshape(num_tokens, *values.shape[2:]), found)
