"""The decode loop: many tokens for every row in one call to the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.backend import chooses_compiled, row_sums_for
from jax_chunkattn.device.choices import item_columns, row_choices
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.head_maps import attention_of, head_windows_of, row_heads
from jax_chunkattn.device.mesh import EngineMesh, attend_with
from jax_chunkattn.device.model_interface import Attend, CacheSpec, DecoderModel
from jax_chunkattn.device.pool import Pool, SelectivePool
from jax_chunkattn.device.read_counts import ReadCounts
from jax_chunkattn.device.request_table import DeviceState, count_tokens
from jax_chunkattn.sampling import Logprobs, log_probabilities, sample
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.plans import DecodePlan, DecodeReads, HostOrDevice
from pallas_kernels.selection import ItemColumns

NOTHING = -1  # in place of a token, where a row emitted none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """What a call chose: `NOTHING` where a row was frozen, `NO_CHOICE` where its logits were no
    numbers, which freezes it."""

    tokens: Int32[HostOrDevice, "*K B"]
    logprobs: Logprobs  # *K B
    counts: ReadCounts | None = None  # of all steps together, where rows choose what they read
    scores: Logprobs | None = None  # T, of tokens that were given


def decode_steps(
    model: DecoderModel,
    state: DeviceState,
    slots: Int32[HostOrDevice, " B"],
    plan: DecodePlan,
    *,
    num_steps: int,
    implementation: str | None = None,
    mesh: EngineMesh | None = None,
) -> tuple[DeviceState, Chosen]:
    """Up to K = `num_steps` tokens for each row that is not frozen.

    Each step feeds every row's chosen token at position `lengths`, writes its keys and values into
    the row's private chunks (the plan must reach K tokens ahead), attends, and chooses the next. A
    row freezes after a stop token or when `remaining` is used up; the loop ends early when all
    rows are frozen. Donate the state: it is then updated in place.

    Args:
      slots: of the rows, in the plan's order; S for padding.
      mesh: that model and pool are laid over; None is one device.

    Returns:
      The new state, and what was chosen at each step.
    """
    table = state.table
    slots = jnp.asarray(slots)
    rows, sampling = table.take(slots)
    columns = item_columns(model.cache_spec, state.pool, plan)
    row_sums = row_sums_for(implementation)

    def unfinished(carry):
        step, _, _, rows, _ = carry
        return (step < num_steps) & jnp.any(rows.remaining > 0)

    def advance(carry):
        step, pool, counts, rows, chosen = carry
        active = rows.remaining > 0
        here = DecodeRows(plan, slots, rows.lengths, active)
        spec = model.cache_spec
        attend = decode_attend(spec, pool, here, implementation, columns, mesh=mesh)
        hidden, pool = model(rows.tokens, rows.lengths, pool, attend)
        pool = pool.seal(here)
        logits = model.logits(hidden)
        following = sample(
            logits, sampling, rows.lengths + 1, lambda: counts.take(slots), row_sums=row_sums
        )
        emitted = Chosen(
            jnp.where(active, following, NOTHING),
            log_probabilities(logits, following, sampling.logprobs, row_sums=row_sums),
        )
        chosen = jax.tree.map(lambda all, one: all.at[step].set(one), chosen, emitted)
        counts = count_tokens(counts, slots, following, active)
        rows = rows.choose(following, sampling.stop_tokens)
        rows = replace(rows, lengths=rows.lengths + active.astype(jnp.int32))
        return step + 1, pool, counts, rows, chosen

    pool, chooses = state.pool, columns is not None
    if chooses and isinstance(pool, SelectivePool):
        pool = pool.counting_anew()
    start = (jnp.int32(0), pool, table.counts, rows, _nothing(num_steps, len(slots)))
    _, pool, counts, rows, chosen = lax.while_loop(unfinished, advance, start)
    table = replace(table.put(slots, rows), counts=counts)
    if chooses and isinstance(pool, SelectivePool):
        chosen = replace(chosen, counts=pool.counts)
    return DeviceState(pool, table), chosen


def _nothing(num_steps: int, batch: int) -> Chosen:
    empty = Logprobs.empty(batch)
    logprobs = jax.tree.map(lambda one: jnp.broadcast_to(one, (num_steps, *one.shape)), empty)
    return Chosen(jnp.full((num_steps, batch), NOTHING, jnp.int32), logprobs)


def decode_attend(
    spec: CacheSpec,
    pool: Pool,
    rows: DecodeRows,
    implementation: str | None,
    columns: ItemColumns | None = None,
    *,
    mesh: EngineMesh | None = None,
) -> Attend:
    """The `attend` a model is given for a step over such a pool: write one token a row, attend by
    the plan, or where rows choose to what they have chosen of it, with each head, or one for its
    cluster. `columns` are the plan's `item_columns`."""
    compiled = chooses_compiled(implementation)
    choices = row_choices(spec, pool, rows, columns, compiled=compiled)
    heads = row_heads(pool, rows)
    attention = attention_of(pool, spec.attention)

    def attend(
        pool: Pool,
        layer: Int32[Array, ""],
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
    ) -> tuple[Float[Array, "B Hq D"], Pool]:
        if heads is not None:
            (q, k, v), pool = heads.apply(pool, layer, q, k, v)
        pool = pool.write_rows(layer, k, v, rows)
        # Of frozen rows only padding gives zeros; what the others get is thrown away.
        visible = jnp.where(rows.active, rows.lengths + 1, 0)
        windows = head_windows_of(pool, spec, layer)
        reads = DecodeReads(rows.plan, visible, pool.own_chunks(rows), windows)
        if choices is not None:
            reads, pool = choices.apply(pool, layer, q, reads)
        stored, reads = pool.at_layer(layer), pool.locate(layer, reads)
        operands = q, stored, reads, attention
        output = attend_with(CHUNK_ATTENTION, *operands, implementation=implementation, mesh=mesh)
        return output, pool

    return attend
