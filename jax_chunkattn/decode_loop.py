"""The decode loop: many tokens for every row in one call to the device."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jax_chunkattn.model_interface import DecoderModel
from jax_chunkattn.pool import ChunkPool
from jax_chunkattn.sampling import RowSampling, sample
from pallas_kernels import DecodePlan, chunk_attention, write_kv
from pallas_kernels.plans import HostOrDevice

NOTHING = -1  # in place of a token, where a row emitted none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where every row stands between two tokens.

    A row with `remaining` 0 is frozen: it is finished, or padding.
    """

    tokens: Int32[HostOrDevice, " B"]  # chosen, not yet fed to the model
    lengths: Int32[HostOrDevice, " B"]  # tokens whose keys and values are in the pool
    remaining: Int32[HostOrDevice, " B"]  # tokens the row may still choose


def decode_steps(
    model: DecoderModel,
    pool: ChunkPool,
    state: DecodeState,
    plan: DecodePlan,
    sampling: RowSampling,
    stop_tokens: Int32[Array, " E"],
    *,
    num_steps: int,
    implementation: str | None = None,
) -> tuple[ChunkPool, DecodeState, Int32[Array, "K B"]]:
    """Up to K = `num_steps` tokens for each row that is not frozen.

    Each step feeds every row's chosen token at position `lengths`, writes its keys and values into
    the row's private chunks (the plan must reach K tokens ahead), attends, and chooses the next. A
    row freezes after a stop token or when `remaining` is used up; the loop ends early when all
    rows are frozen. Donate the pool: it is then updated in place.

    Returns:
      The pool, the new state, and the tokens chosen at each step, `NOTHING` where a row was frozen.
    """
    batch = state.tokens.shape[0]

    def unfinished(carry):
        step, _, state, _ = carry
        return (step < num_steps) & jnp.any(state.remaining > 0)

    def advance(carry):
        step, pool, state, chosen = carry
        active = state.remaining > 0
        attend = decode_attend(plan, state.lengths, active, implementation)
        hidden, pool = model(state.tokens, state.lengths, pool, attend)
        following = sample(model.logits(hidden), sampling, state.lengths + 1)
        stopped = jnp.isin(following, stop_tokens)
        remaining = jnp.where(stopped, 0, state.remaining - 1)
        chosen = chosen.at[step].set(jnp.where(active, following, NOTHING))
        state = DecodeState(
            tokens=jnp.where(active, following, state.tokens),
            lengths=state.lengths + active.astype(jnp.int32),
            remaining=jnp.where(active, remaining, 0),
        )
        return step + 1, pool, state, chosen

    chosen = jnp.full((num_steps, batch), NOTHING, jnp.int32)
    start = (jnp.int32(0), pool, state, chosen)
    _, pool, state, chosen = lax.while_loop(unfinished, advance, start)
    return pool, state, chosen


def decode_attend(
    plan: DecodePlan,
    lengths: Int32[Array, " B"],
    active: Bool[Array, " B"],
    implementation: str | None,
):
    """The `attend` a model is given while decoding: write one token a row, attend by the plan."""

    def attend(pool: ChunkPool, layer, q, k, v):
        slot = lengths - plan.covered_tokens
        index = jnp.minimum(slot // pool.chunk_size, plan.private_chunks.shape[1] - 1)
        chunks = jnp.take_along_axis(plan.private_chunks, index[:, None], axis=1)[:, 0]
        chunks = jnp.where(active, chunks, pool.num_chunks)
        keys, values = write_kv(
            pool.keys, pool.values, k, v, chunks, slot % pool.chunk_size, layer=layer
        )
        visible = jnp.where(active, lengths + 1, 0)
        output = chunk_attention(
            q, keys, values, plan, visible, layer=layer, implementation=implementation
        )
        return output, ChunkPool(keys, values)

    return attend
