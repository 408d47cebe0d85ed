"""What the engine needs from a model: the seam between `jax_chunkattn` and any decoder.

Letters: T tokens, E hidden size, V vocabulary, Hq query heads, Hkv key/value heads, D head dim, R
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec

Pool = Any
"""Any pytree of device arrays; a model only threads it through its layers."""

Attend = Callable[
    [
        Pool,
        Int32[Array, ""],
        Float[Array, "T Hq D"],
        Float[Array, "T Hkv D"],
        Float[Array, "T Hkv D"],
    ],
    tuple[Float[Array, "T Hq D"], Pool],
]
"""`attend(pool, layer, q, k, v) -> (output, pool)`.

`layer` is an int32 scalar that may be traced. `q` and `k` arrive already rotated. `attend` writes
`k` and `v` to the pool and only then attends, so that a token sees itself.
"""


@dataclass(frozen=True)
class CacheSpec:
    """What a model keeps of a token, and what reads it.

    Attributes:
      num_layers, num_kv_heads, head_dim: the shape of a token's keys, and of its values.
      num_heads: query heads; each KV head is read by `num_heads // num_kv_heads` of them.
      softcap: keeps scores within (-softcap, softcap), see `chunk_attention`; None leaves them.
      scale: multiplies the scores; None is `1 / sqrt(head_dim)`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_heads: int
    softcap: float | None = None
    scale: float | None = None

    @property
    def attention(self) -> AttentionSpec:
        """The attention that reads it."""
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        return AttentionSpec.of(*sizes, scale=self.scale, softcap=self.softcap)

    @property
    def values_per_token(self) -> int:
        """Numbers that the cache keeps of a token: its keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@runtime_checkable
class DecoderModel(Protocol):
    """A decoder the engine can run; in this project an `nnx.Module`."""

    cache_spec: CacheSpec
    vocab_size: int
    max_positions: int

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, pool: Pool, attend: Attend
    ) -> tuple[jax.Array, Pool]:
        """Run all layers over `tokens [T]` at `positions [T]` (both int32).

        Returns the hidden states `[T, E]` *before* the final norm, and the pool. The pool travels
        in the carry of the layer scan, never as its xs or ys, so that it is updated in place.
        """
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and unembedding: `hidden [R, E] -> [R, V]` float32."""
        ...
