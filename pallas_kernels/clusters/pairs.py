"""What is to be computed for the heads of one sequence: scores of each cluster once, and with their
weights the values of each KV head that has a head in it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.head_map import GroupedHeads


@dataclass(frozen=True)
class ClusterPairs:
    """The clusters in the order of their representatives, and pairs of a cluster and a KV head in
    the order of the clusters: heads of one pair have one output.

    Letters: H query heads.
    """

    clusters: Int32[Array, ""]  # how many there are
    representative: Int32[Array, " H"]  # of a cluster
    first_pair: Int32[Array, " H+1"]  # of a cluster; those of the next one follow
    kv_head: Int32[Array, " H"]  # of a pair
    cluster_of: Int32[Array, " H"]  # of a head
    pair_of: Int32[Array, " H"]  # of a head

    @classmethod
    def of(cls, representatives: Int32[Array, " H"], heads: GroupedHeads) -> ClusterPairs:
        """By the head that attends for each."""
        number = heads.query_heads
        head = jnp.arange(number, dtype=jnp.int32)
        attends = representatives == head
        index = jnp.cumsum(attends, dtype=jnp.int32) - 1
        (representative,) = jnp.nonzero(attends, size=number, fill_value=0)
        cluster_of = index[representatives]
        place = cluster_of * heads.kv_heads + head // heads.group
        there = jnp.zeros(number * heads.kv_heads, jnp.bool_).at[place].set(True)
        before = jnp.cumsum(there, dtype=jnp.int32)
        (pair,) = jnp.nonzero(there, size=number, fill_value=0)
        ends = before.reshape(number, heads.kv_heads)[:, -1]
        return cls(
            attends.sum(dtype=jnp.int32),
            representative.astype(jnp.int32),
            jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
            pair.astype(jnp.int32) % heads.kv_heads,
            cluster_of,
            before[place] - 1,
        )
