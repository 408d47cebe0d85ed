"""How many of the chunks before them rows have read while they decoded, and how alike."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.plans import HostOrDevice


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReadCounts:
    """Chunks of each of L layers, added up over rows that decode and their steps.

    Of those that work items have for several rows it counts also what these rows chose: `together`
    what any of an item's rows has chosen, `each` what one of them has in the mean.
    """

    there: Float[HostOrDevice, " L"]  # those before the row's token, with the one it lies in
    read: Float[HostOrDevice, " L"]
    together: Float[HostOrDevice, " L"]
    each: Float[HostOrDevice, " L"]

    @classmethod
    def none(cls, layers: int) -> ReadCounts:
        """Nothing counted yet."""
        return cls(*(jnp.zeros(layers, jnp.float32) for _ in range(4)))

    def plus_layer(self, layer: Int32[Array, ""], more: ReadCounts) -> ReadCounts:
        """With what a layer's rows read at a step: `more` is of that layer alone."""
        return jax.tree.map(lambda one, new: one.at[layer].add(new[0]), self, more)

    def plus(self, more: ReadCounts) -> ReadCounts:
        """With what another call's rows read; on the host, in float64."""
        return jax.tree.map(lambda one, new: np.asarray(one, np.float64) + new, self, more)

    @property
    def selected_share(self) -> float | None:
        """How much of what was there was read, over all layers; None before anything was."""
        return _ratio(np.sum(self.read), np.sum(self.there))

    @property
    def union_factor(self) -> float | None:
        """How many times as many chunks several rows read together as one of them chose, over all
        layers: 1 where all choose alike. None where rows that choose have had none in common."""
        return _ratio(np.sum(self.together), np.sum(self.each))

    @property
    def by_layer(self) -> list[tuple[float | None, float | None]]:
        """Both numbers, layer by layer."""
        counts = np.stack([self.read, self.there, self.together, self.each], axis=1)
        return [
            (_ratio(read, there), _ratio(together, each)) for read, there, together, each in counts
        ]


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
