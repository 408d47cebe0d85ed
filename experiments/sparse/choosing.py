"""Attention of queries that choose what they read, as the device does it for one layer
after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jax_chunkattn import CacheConfig, CacheSpec
from jax_chunkattn.device.backend import choose_backend, chooses_compiled
from jax_chunkattn.device.choices import item_columns, row_choices, token_choices
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.pool import SelectivePool, empty_pool
from jax_chunkattn.device.prefill import attend_prompts
from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from pallas_kernels import DecodePlan, PrefillPlan
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.plans import DecodeReads, PrefillReads
from pallas_kernels.selection import ChunkSelector, ItemColumns


@dataclass(frozen=True)
class Choosing:
    """A decode step of rows that have chosen before, and a prefill call at the end of a prefix.

    A query chooses anew where its position is a multiple of `refresh`: of rows at positions that
    follow one another, at every step the same number do.
    """

    spec: CacheSpec
    pool: SelectivePool
    plan: DecodePlan
    item_columns: ItemColumns
    lengths: Int32[Array, " B"]
    prefill_plan: PrefillPlan

    @classmethod
    def of(
        cls,
        selector: ChunkSelector,
        spec: CacheSpec,
        keys: jax.Array,
        values: jax.Array,
        tables: Sequence[Sequence[int]],
        length: int,
        segment: Segment,
    ) -> Choosing:
        """Rows of `length` tokens and a few more, each another number; a segment to compute."""
        rows, (num_chunks, size) = len(tables), keys.shape[2:4]
        columns = max(map(len, tables))
        config = CacheConfig(num_chunks, size, selector=selector)
        options = choose_backend(spec, config).planner
        sizes: Any = {"chunk_size": size, "num_chunks": num_chunks, "options": options}
        lengths = [length + row % selector.refresh for row in range(rows)]
        plan, _ = plan_decode(tables, lengths, columns=columns, **sizes)
        tokens = len(segment.tokens)
        batch = pack_segments([segment], num_tokens=tokens, num_slots=rows, **sizes)
        pool = empty_pool(spec, config, rows, columns)
        assert isinstance(pool, SelectivePool)
        landmarks = jax.jit(pool.kept.make)(keys)
        pool = replace(pool, kv=replace(pool.kv, keys=keys, values=values), landmarks=landmarks)
        padded = jnp.zeros(plan.num_rows, jnp.int32).at[:rows].set(jnp.array(lengths, jnp.int32))
        plan = jax.device_put(plan)
        found = item_columns(spec, pool, plan)
        assert found is not None
        return cls(spec, pool, plan, found, padded, jax.device_put(batch.plan))

    def all_chosen(self, q: jax.Array) -> Choosing:
        """With a choice of every row, as if it had chosen at its last chance."""
        every = self.lengths // self.pool.selector.refresh * self.pool.selector.refresh
        _, columns, _ = self._step(q, every)
        return replace(self, pool=replace(self.pool, columns=columns))

    def decode(self, q: jax.Array) -> jax.Array:
        """A step."""
        return self._step(q, self.lengths)[0]

    def chunk_reads(self, q: jax.Array) -> int:
        """Chunks that a step reads of a layer: of tiles, and of each row by itself."""
        return int(self._step(q, self.lengths)[2])

    def _step(
        self, q: jax.Array, lengths: Int32[Array, " B"]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _decode(self.spec, q, self.pool, self.plan, self.item_columns, lengths)

    def prefill(self, q: jax.Array) -> jax.Array:
        """A call."""
        return _prefill(self.spec, q, self.pool, self.prefill_plan)


@partial(jax.jit, static_argnums=0)
def _decode(spec, q, pool, plan, columns, lengths):
    slots = jnp.arange(len(lengths), dtype=jnp.int32)
    rows = DecodeRows(plan, slots, lengths, lengths > 0)
    choices = row_choices(spec, pool, rows, columns, compiled=chooses_compiled(None))
    assert choices is not None

    def attend(layer, carry):
        total, chosen, chunks = carry
        reads, after = choices.apply(
            replace(pool, columns=chosen), layer, q, DecodeReads(plan, lengths + 1)
        )
        items, tiles, size = reads.plan.items, reads.plan.tiles, pool.chunk_size
        in_common = jnp.where(items.count > 0, items.chunk_count.sum(), 0)
        in_common += 0 if tiles is None else tiles.count
        left = jnp.where(lengths > 0, lengths + 1 - reads.plan.covered_tokens, 0)
        by_rows = ((left + size - 1) // size).sum()
        output = CHUNK_ATTENTION.attend(q, pool.at_layer(layer), reads, spec.attention)
        return total + output, after.columns, chunks + in_common + by_rows

    # The whole pool would be copied, so of what changes choices alone are carried.
    start = jnp.zeros_like(q), pool.columns, jnp.int32(0)
    output, chosen, chunks = lax.fori_loop(0, spec.num_layers, attend, start)
    return output, chosen, chunks // spec.num_layers


@partial(jax.jit, static_argnums=0)
def _prefill(spec, q, pool, plan):
    choices = token_choices(spec, pool, plan, compiled=chooses_compiled(None))
    reads = PrefillReads(plan, QUERY_TILE)

    def attend(layer, total):
        return total + attend_prompts(spec, pool, layer, q, reads, choices=choices)[0]

    return lax.fori_loop(0, spec.num_layers, attend, jnp.zeros_like(q))


def alike(
    random: np.random.Generator, rows: int, shape: tuple[int, ...], agreement: float
) -> np.ndarray:
    """Normal queries, float32 [rows, *shape]; any two rows' have this cosine in the mean."""
    common, own = random.standard_normal((1, *shape)), random.standard_normal((rows, *shape))
    mixed = agreement**0.5 * common + (1 - agreement) ** 0.5 * own
    return mixed.astype(np.float32)
