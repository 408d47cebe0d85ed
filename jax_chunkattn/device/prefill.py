"""Prefill, on the device: computing packed tokens, and the tokens that follow them."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.backend import chooses_compiled, row_sums_for
from jax_chunkattn.device.choices import TokenChoices, token_choices
from jax_chunkattn.device.decode_loop import NOTHING, Chosen
from jax_chunkattn.device.head_maps import attention_of, head_windows_of, token_heads
from jax_chunkattn.device.mesh import EngineMesh, attend_with
from jax_chunkattn.device.model_interface import Attend, CacheSpec, DecoderModel
from jax_chunkattn.device.pool import Pool
from jax_chunkattn.device.request_table import DeviceState, count_tokens
from jax_chunkattn.device.scores import score_tokens
from jax_chunkattn.planning.prefill import QUERY_TILE, PrefillBatch
from jax_chunkattn.sampling import log_probabilities, sample
from pallas_kernels.plans import HostOrDevice, PrefillPlan, PrefillReads
from pallas_kernels.prefill_attention import PREFILL_ATTENTION


def prefill_step(
    model: DecoderModel,
    state: DeviceState,
    slots: Int32[HostOrDevice, " S"],
    batch: PrefillBatch,
    *,
    implementation: str | None = None,
    mesh: EngineMesh | None = None,
) -> tuple[DeviceState, Chosen]:
    """Computes the packed tokens, and the token that follows each segment.

    Keys and values are written layer by layer before they are attended to, so a segment may build
    on another one of the same call.

    Args:
      slots: of the rows that the segments complete the prompts of; the number of slots for others.
      mesh: that model and pool are laid over; None is one device.

    Returns:
      The new state, those rows ready to decode, and what was chosen, `NOTHING` for other segments;
      with the scores of the tokens that the call scores.
    """
    spec = model.cache_spec
    attend = prefill_attend(spec, state.pool, batch.plan, implementation, mesh=mesh)
    tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
    slots = jnp.asarray(slots)
    table = state.table
    rows, sampling = table.take(slots)
    hidden, pool = model(tokens, positions, state.pool, attend)
    following = jnp.take(positions, batch.last_token) + 1
    logits = model.logits(jnp.take(hidden, batch.last_token, axis=0))
    row_sums = row_sums_for(implementation)
    drawn = sample(logits, sampling, following, lambda: table.counts.take(slots), row_sums=row_sums)
    active = rows.remaining > 0
    logprobs = log_probabilities(logits, drawn, sampling.logprobs, row_sums=row_sums)
    scores = None
    if batch.scored is not None:
        scores = score_tokens(model, hidden, batch.scored, row_sums=row_sums)
    chosen = Chosen(jnp.where(active, drawn, NOTHING), logprobs, scores=scores)
    counts = count_tokens(table.counts, slots, drawn, active)
    table = replace(table.put(slots, rows.choose(drawn, sampling.stop_tokens)), counts=counts)
    return DeviceState(pool, table), chosen


def prefill_attend(
    spec: CacheSpec,
    pool: Pool,
    plan: PrefillPlan,
    implementation: str | None,
    *,
    mesh: EngineMesh | None = None,
) -> Attend:
    """The `attend` a model is given for a call over such a pool: write all new tokens, attend by
    the plan, or where tokens choose to what they have chosen of it, with each head, or one for its
    cluster."""
    choices = token_choices(spec, pool, plan, compiled=chooses_compiled(implementation))
    heads = token_heads(pool, plan)

    def attend(
        pool: Pool,
        layer: Int32[Array, ""],
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
    ) -> tuple[Float[Array, "T Hq D"], Pool]:
        if heads is not None:
            (q, k, v), pool = heads.apply(pool, layer, q, k, v)
        pool, new = pool.write_prompts(layer, k, v, plan)
        reads = PrefillReads(plan, QUERY_TILE, new, head_windows_of(pool, spec, layer))
        return attend_prompts(spec, pool, layer, q, reads, implementation, choices, mesh=mesh)

    return attend


def attend_prompts(
    spec: CacheSpec,
    pool: Pool,
    layer: Int32[Array, ""],
    q: Float[Array, "T Hq D"],
    reads: PrefillReads,
    implementation: str | None = None,
    choices: TokenChoices | None = None,
    *,
    mesh: EngineMesh | None = None,
) -> tuple[Float[Array, "T Hq D"], Pool]:
    """What the tokens of a call get, by the plan or by what they have chosen of it; where none of
    them leaves anything out as if none could: a plan of what is chosen has smaller tiles."""

    def attend(pool: Pool, reads: PrefillReads) -> Float[Array, "T Hq D"]:
        stored, reads = pool.at_layer(layer), pool.locate(layer, reads)
        operands = q, stored, reads, attention_of(pool, spec.attention)
        return attend_with(PREFILL_ATTENTION, *operands, implementation=implementation, mesh=mesh)

    if choices is None:
        return attend(pool, reads), pool
    selected, pool = choices.apply(pool, layer, q, reads)
    leaves_out = choices.leaves_out(pool, layer)
    output = lax.cond(leaves_out, lambda: attend(pool, selected), lambda: attend(pool, reads))
    return output, pool
