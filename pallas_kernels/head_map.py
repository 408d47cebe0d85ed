"""Which KV head's keys and values a query head reads."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float, Int32


@dataclass(frozen=True)
class GroupedHeads:
    """Grouped-query attention (arXiv 2305.13245): query head `h` reads KV head `h // G`.

    Raises:
      ValueError: for query heads that are not a multiple of the KV heads.
    """

    query_heads: int  # Hq
    kv_heads: int  # Hkv

    def __post_init__(self):
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"{self.query_heads} query heads are not a multiple of {self.kv_heads} KV heads"
            )

    @property
    def group(self) -> int:
        """Query heads that read one KV head, G."""
        return self.query_heads // self.kv_heads

    def first_query_head(self, kv_head: Int32[Array, ""]) -> Int32[Array, ""]:
        """The first of the G query heads that read a KV head; the others follow it."""
        return kv_head * self.group

    def split(self, q: Float[Array, "B Hq D"]) -> Float[Array, "B Hkv G D"]:
        """Query heads by the KV head that they read."""
        rows, _, head_dim = q.shape
        return q.reshape(rows, self.kv_heads, self.group, head_dim)

    def join(self, q: Float[Array, "B Hkv G D"]) -> Float[Array, "B Hq D"]:
        """The inverse of `split`."""
        return q.reshape(q.shape[0], self.query_heads, q.shape[-1])
