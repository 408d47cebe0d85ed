"""The arrays that full chunks lie in, whatever kind of pool they are of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from pallas_kernels.plans import HostOrDevice
from pallas_kernels.pool_writes import copy_slots, put_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkArrays:
    """All that is kept of full chunks, in trees of arrays: of a whole pool, or of some chunks.

    Attributes:
      of_heads: arrays whose third dimension counts chunks, behind layers and heads.
      others: arrays whose second does.
    """

    of_heads: Any
    others: Any = field(default_factory=dict)

    def copied(
        self, sources: Int32[HostOrDevice, " M"], destinations: Int32[HostOrDevice, " M"]
    ) -> ChunkArrays:
        """With chunks copied; all are read before any is written. A destination behind the last
        drops one."""
        return self._each(lambda axis, one: copy_slots(one, sources, destinations, axis))

    def take(self, chunks: Int32[HostOrDevice, " M"]) -> ChunkArrays:
        """Of these chunks; of one behind the last it is the last's."""
        return self._each(lambda axis, one: jnp.take(one, chunks, axis=axis, mode="clip"))

    def put(self, chunks: Int32[HostOrDevice, " M"], new: ChunkArrays) -> ChunkArrays:
        """With what is kept of these chunks replaced; one behind the last is dropped."""
        return self._each(lambda axis, one, new: put_slots(one, new, chunks, axis), new)

    def _each(self, change: Any, *others: ChunkArrays) -> ChunkArrays:
        """Of each array, with the dimension that counts chunks."""

        def of(axis: int, *trees: Any) -> Any:
            return jax.tree.map(lambda *arrays: change(axis, *arrays), *trees)

        return ChunkArrays(
            of(2, self.of_heads, *(one.of_heads for one in others)),
            of(1, self.others, *(one.others for one in others)),
        )
