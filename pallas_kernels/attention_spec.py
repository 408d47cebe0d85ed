"""The static description of an attention: what one compiled program computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxtyping import Array, Float

from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.softcap import cap_scores


@dataclass(frozen=True)
class AttentionSpec:
    """How queries, keys and values make an output.

    Attributes:
      heads: which KV head each query head reads.
      scale: multiplies the scores.
      softcap: keeps scaled scores within (-softcap, softcap); None leaves them as they are.

    Raises:
      ValueError: for a softcap that is not positive and finite.
    """

    heads: GroupedHeads
    scale: float
    softcap: float | None = None

    def __post_init__(self):
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                "softcap must be positive and finite, or None for scores as they are, "
                f"not {self.softcap}"
            )

    @classmethod
    def of(
        cls,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> AttentionSpec:
        """Grouped heads of `head_dim`; a scale of None is `1 / sqrt(head_dim)`.

        Raises:
          ValueError: for heads that do not divide, or a softcap that is not positive and finite.
        """
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        return cls(GroupedHeads(query_heads, kv_heads), scale, softcap)

    @property
    def by_query_head(self) -> AttentionSpec:
        """The same with a KV head for each query head."""
        heads = self.heads.query_heads
        return replace(self, heads=GroupedHeads(heads, heads))

    def cap(self, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scaled scores, with the softcap applied; not masked yet."""
        return cap_scores(scores, self.softcap)
