"""Queries, keys and values as clustered heads read them, while a model runs: by step when decoding,
by call in prefill."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.clustered_pool import ClusteredPool
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.pool import Pool
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.plans import PrefillPlan

ByHead = tuple[Float[Array, "T Hq D"], Float[Array, "T Hq D"], Float[Array, "T Hq D"]]
"""Queries, keys and values, each of every query head."""


def attention_of(pool: Pool, attention: AttentionSpec) -> AttentionSpec:
    """The attention to what a pool holds: where heads form clusters, each query head reads keys and
    values of its own."""
    if not isinstance(pool, ClusteredPool):
        return attention
    heads = attention.heads.query_heads
    return replace(attention, heads=GroupedHeads(heads, heads))


@dataclass(frozen=True)
class RowHeads:
    """The heads of a decode batch's rows at one step."""

    rows: DecodeRows
    first_chunks: Int32[Array, " B"]  # of their sequences; N where that is the one they decode in

    @classmethod
    def of(cls, pool: ClusteredPool, rows: DecodeRows) -> RowHeads:
        """By the tables of the plan."""
        tables = rows.plan.tables
        assert tables is not None, "planned with the rows' tables"
        in_first = rows.lengths < pool.chunk_size
        return cls(rows, jnp.where(in_first, pool.num_chunks, jnp.asarray(tables)[:, 0]))

    def apply(
        self,
        pool: Pool,
        layer: Int32[Array, ""],
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
    ) -> tuple[ByHead, ClusteredPool]:
        """As the rows' heads read them; and the pool with queries of first chunks."""
        assert isinstance(pool, ClusteredPool), "they were made for one"
        rows, size = self.rows, pool.chunk_size
        in_first = rows.active & (rows.lengths < size)
        slots = jnp.where(in_first, rows.slots, pool.num_slots)
        pool = pool.write_queries(layer, q, slots, rows.lengths % size)
        return _by_head(q, k, v, pool.read_by(layer, self.first_chunks)), pool


@dataclass(frozen=True)
class TokenHeads:
    """The heads of a prefill call's tokens."""

    plan: PrefillPlan
    first_chunks: Int32[Array, " T"]  # of their sequences; N where that is the one they lie in
    query_slots: Int32[Array, " T"]  # whose tail keeps a token's queries; S where none does

    @classmethod
    def of(cls, pool: ClusteredPool, plan: PrefillPlan) -> TokenHeads:
        """By the tables of the plan."""
        sealing = plan.sealing
        assert sealing is not None, "planned for a pool that makes something of full chunks"
        sequence, positions = plan.token_positions(len(plan.write_offsets))
        in_first = positions < pool.chunk_size
        first = jnp.asarray(plan.block_tables)[sequence, 0]
        return cls(
            plan,
            jnp.where(in_first, pool.num_chunks, first),
            jnp.where(in_first, jnp.asarray(sealing.tail_slots), pool.num_slots),
        )

    def apply(
        self,
        pool: Pool,
        layer: Int32[Array, ""],
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
    ) -> tuple[ByHead, ClusteredPool]:
        """As the tokens' heads read them; and the pool with the maps of chunks that the call
        completes, and queries of first chunks that it does not."""
        assert isinstance(pool, ClusteredPool), "they were made for one"
        pool = pool.with_first_chunks(layer, q, k, self.plan)
        pool = pool.write_queries(layer, q, self.query_slots, self.plan.write_offsets)
        return _by_head(q, k, v, pool.read_by(layer, self.first_chunks)), pool


def row_heads(pool: Pool, rows: DecodeRows) -> RowHeads | None:
    """The heads of rows at a step; None for a pool where each attends for itself."""
    return RowHeads.of(pool, rows) if isinstance(pool, ClusteredPool) else None


def token_heads(pool: Pool, plan: PrefillPlan) -> TokenHeads | None:
    """The heads of a prefill call's tokens; None for a pool where each attends for itself."""
    return TokenHeads.of(pool, plan) if isinstance(pool, ClusteredPool) else None


def _by_head(
    q: Float[Array, "T Hq D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    representatives: Int32[Array, "T Hq"],
) -> ByHead:
    group = q.shape[1] // k.shape[1]
    reads = representatives[:, :, None]
    return (
        jnp.take_along_axis(q, reads, axis=1),
        jnp.take_along_axis(k, reads // group, axis=1),
        jnp.repeat(v, group, axis=1),
    )
