"""How many clusters the query heads of each layer form, and which keys are kept for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.clusters.membership import MEMBERSHIPS, MOST_HEADS
from pallas_kernels.head_map import GroupedHeads


@dataclass(frozen=True)
class HeadClusters:
    """Clustered-head attention (CHAI, arXiv 2403.08058, section 3): how it is cut for a model.

    How many clusters a layer has is known beforehand; which heads are in them depends on the first
    chunk of a sequence, and is the same for all that begin with it.

    Attributes:
      counts: of each layer, clusters of its query heads; as many as heads for those as they are.
      membership: how heads find together and which of them attends for its cluster. "medoid":
        those whose attention is alike, and the head that is nearest to all others of its cluster.
        To measure it against: "lowest", the same clusters and the first head of each; "random",
        clusters by chance.
      seed: of clusters by chance.

    Raises:
      ValueError: for no layers, counts below 1, or an unknown membership.
    """

    counts: tuple[int, ...]
    membership: str = "medoid"
    seed: int = 0

    def __post_init__(self):
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"each layer has at least one cluster of heads, got {self.counts}")
        if self.membership not in MEMBERSHIPS:
            known = ", ".join(MEMBERSHIPS)
            raise ValueError(f"unknown membership {self.membership!r}; known: {known}")

    @property
    def name(self) -> str:
        """In results and statistics."""
        return f"{self.membership} {sum(self.counts)}"

    def check(self, layers: int, heads: GroupedHeads) -> None:
        """Raises ValueError for counts of another number of layers, or of more clusters than a
        layer has query heads."""
        if len(self.counts) != layers:
            raise ValueError(f"clusters of {len(self.counts)} layers for a model of {layers}")
        if max(self.counts) > heads.query_heads:
            layer = self.counts.index(max(self.counts))
            raise ValueError(
                f"layer {layer} is to have {max(self.counts)} clusters of {heads.query_heads} heads"
            )
        if heads.query_heads > MOST_HEADS:
            raise ValueError(f"at most {MOST_HEADS} heads form clusters, got {heads.query_heads}")

    def merges(self, heads: GroupedHeads) -> bool:
        """Whether any heads share a cluster; where none do, attention is what it is without."""
        return min(self.counts) < heads.query_heads


@dataclass(frozen=True)
class KeySlots:
    """Where the keys of a layer's clusters are kept: each of the KV heads that some cluster reads
    has a slot of the layer. Layers have as many slots as clusters, and no more than KV heads.

    Letters: L layers, Hq query heads, K slots of all layers.

    Attributes:
      counts: slots of each layer.
    """

    heads: GroupedHeads
    counts: tuple[int, ...]

    @classmethod
    def of(cls, clusters: HeadClusters, heads: GroupedHeads) -> KeySlots:
        """Of a model's layers."""
        return cls(heads, tuple(min(count, heads.kv_heads) for count in clusters.counts))

    @property
    def total(self) -> int:
        """Slots of all layers, K."""
        return sum(self.counts)

    @property
    def begins(self) -> tuple[int, ...]:
        """The first slot of each layer."""
        return tuple(accumulate(self.counts[:-1], initial=0))

    def of_heads(self, representatives: Int32[Array, "*maps Hq"]) -> Int32[Array, "*maps Hq"]:
        """The slot of its layer that each query head reads, whose cluster's representative this
        is: that of the representative's KV head, counted among those that are read."""
        reads = representatives // self.heads.group
        read = jax.nn.one_hot(reads, self.heads.kv_heads, dtype=jnp.bool_).any(axis=-2)
        slot = jnp.cumsum(read, axis=-1, dtype=jnp.int32) - 1
        return jnp.take_along_axis(slot, reads, axis=-1)

    def kept(self, representatives: Int32[Array, "*maps Hq"]) -> Int32[Array, "*maps S"]:
        """For each slot that a layer may have, a query head that attends for its cluster and whose
        keys it holds; the first head where a slot holds none."""
        place = self.of_heads(representatives)
        itself = jnp.arange(self.heads.query_heads, dtype=jnp.int32)
        attends = representatives == jnp.broadcast_to(itself, representatives.shape)
        place = jnp.where(attends, place, -1)
        holds: Bool[Array, "*maps Hq S"] = jax.nn.one_hot(place, max(self.counts), dtype=jnp.bool_)
        return jnp.argmax(holds, axis=-2).astype(jnp.int32)

    def places(self, layer: Int32[Array, ""]) -> Int32[Array, " S"]:
        """Which of all slots those of a layer are; K for those that it has not."""
        slot = jnp.arange(max(self.counts), dtype=jnp.int32)
        begin, count = (jnp.asarray(of, jnp.int32)[layer] for of in (self.begins, self.counts))
        return jnp.where(slot < count, begin + slot, self.total)
