"""Queries, keys and values as clustered heads read them, while a model runs: by step when decoding,
by call in prefill. What does not depend on the layer is found once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_chunkattn.device.clustered_pool import ClusteredPool
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.pool import Pool
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.plans import HostOrDevice, PrefillPlan, Sealing

ByHead = tuple[Float[Array, "T Hq D"], Float[Array, "T Hq D"], Float[Array, "T Hq D"]]
"""Queries, keys and values, each of every query head."""


def attention_of(pool: Pool, attention: AttentionSpec) -> AttentionSpec:
    """The attention to what a pool holds: where heads form clusters, each query head reads keys and
    values of its own."""
    return attention.by_query_head if isinstance(pool, ClusteredPool) else attention


def head_windows_of(
    pool: Pool, spec: CacheSpec, layer: Int32[Array, ""]
) -> Int32[Array, " heads"] | None:
    """The window of each head of a layer, as attention to the pool counts heads."""
    windows = spec.head_windows(layer)
    if windows is None or not isinstance(pool, ClusteredPool):
        return windows
    return jnp.repeat(windows, spec.attention.heads.group)


@dataclass(frozen=True)
class ClusteredHeads:
    """The heads of a decode batch's rows at a step, or of a prefill call's tokens.

    Letters: T rows or tokens, M chunks that the call completes.
    """

    first_chunks: Int32[Array, " T"]  # of their sequences; N where they lie in those
    query_slots: Int32[Array, " T"]  # whose tail keeps their queries; S where none does
    offsets: Int32[HostOrDevice, " T"]  # in the tail
    sealing: Sealing | None = None  # of a prefill call
    sealed_first: Int32[Array, " M"] | None = None  # first chunks of what it completes

    @classmethod
    def of_rows(cls, pool: ClusteredPool, rows: DecodeRows) -> ClusteredHeads:
        """By the tables of the plan."""
        tables, size = rows.plan.tables, pool.chunk_size
        assert tables is not None, "planned with the rows' tables"
        in_first = rows.lengths < size
        return cls(
            jnp.where(in_first, pool.num_chunks, jnp.asarray(tables)[:, 0]),
            jnp.where(rows.active & in_first, rows.slots, pool.num_slots),
            rows.lengths % size,
        )

    @classmethod
    def of_tokens(cls, pool: ClusteredPool, plan: PrefillPlan) -> ClusteredHeads:
        """By the tables of the plan."""
        sealing = plan.sealing
        assert sealing is not None, "planned for a pool that makes something of full chunks"
        sequence, positions = plan.token_positions(len(plan.write_offsets))
        in_first = positions < pool.chunk_size
        tables = jnp.asarray(plan.block_tables)
        # Of windows any will do: what a table lists anew stands behind the first chunk, or is it.
        first = tables.reshape(-1, *tables.shape[-2:])[0, sequence, 0]
        return cls(
            jnp.where(in_first, pool.num_chunks, first),
            jnp.where(in_first, jnp.asarray(sealing.tail_slots), pool.num_slots),
            plan.write_offsets,
            sealing,
            first.at[jnp.asarray(sealing.begin)].get(mode="clip"),
        )

    def apply(
        self,
        pool: Pool,
        layer: Int32[Array, ""],
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
    ) -> tuple[ByHead, ClusteredPool]:
        """As the heads read them; and the pool with the maps of chunks that a call completes, and
        queries of first chunks that are not full."""
        assert isinstance(pool, ClusteredPool), "they were made for one"
        if self.sealing is not None:
            assert self.sealed_first is not None, "of the same call"
            pool = pool.with_sealed_maps(layer, q, k, self.sealing, self.sealed_first)
        pool = pool.write_queries(layer, q, self.query_slots, self.offsets)
        return _by_head(q, k, v, pool.read_by(layer, self.first_chunks)), pool


def row_heads(pool: Pool, rows: DecodeRows) -> ClusteredHeads | None:
    """The heads of rows at a step; None for a pool where each attends for itself."""
    return ClusteredHeads.of_rows(pool, rows) if isinstance(pool, ClusteredPool) else None


def token_heads(pool: Pool, plan: PrefillPlan) -> ClusteredHeads | None:
    """The heads of a prefill call's tokens; None for a pool where each attends for itself."""
    return ClusteredHeads.of_tokens(pool, plan) if isinstance(pool, ClusteredPool) else None


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
