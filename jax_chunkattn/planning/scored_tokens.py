"""Which tokens of a prefill call's text are to be scored: given how likely the model finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int32

from pallas_kernels.plans import HostOrDevice

UNSCORED = -1
"""In place of a target, where none is to be scored; and of how many likeliest are asked for."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredTokens:
    """Of a call of T packed tokens those behind which a given token is scored, one after another.

    Attributes:
      places: where they are packed; T behind the last.
      targets: the tokens that follow them.
      top: how many of the likeliest are reported too; -1 behind the last.
    """

    places: Int32[HostOrDevice, " T"]
    targets: Int32[HostOrDevice, " T"]
    top: Int32[HostOrDevice, " T"]

    @classmethod
    def pack(
        cls, targets: Sequence[Sequence[int]], tops: Sequence[int], num_tokens: int
    ) -> ScoredTokens | None:
        """Of a call of T = `num_tokens`; None where nothing is scored.

        Args:
          targets: of each segment the tokens that follow its own, `UNSCORED` where one is not
            asked for.
          tops: of each segment how many of the likeliest are.
        """
        following = [np.asarray(of_segment, np.int32) for of_segment in targets]
        packed = np.concatenate([*following, np.zeros(0, np.int32)])
        top = np.repeat(np.asarray(tops, np.int32), [len(some) for some in following])
        [places] = np.nonzero(packed != UNSCORED)
        if not places.size:
            return None
        columns = np.full((3, num_tokens), UNSCORED, np.int32)
        columns[0], columns[1] = num_tokens, 0
        columns[:, : len(places)] = places, packed[places], top[places]
        return cls(*columns)
