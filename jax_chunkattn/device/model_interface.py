"""What the engine needs from a model: the seam between `jax_chunkattn` and any decoder.

Letters: T tokens, E hidden size, V vocabulary, Hq query heads, Hkv key/value heads, D head dim, R
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.implementations import ImplementationError
from pallas_kernels.windows import EVERYTHING, Window, WindowMap

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
      windows: which of the tokens before a query its heads see; None where all see all.

    Raises:
      ValueError: for windows of another number of layers or KV heads.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_heads: int
    softcap: float | None = None
    scale: float | None = None
    windows: WindowMap | None = None

    def __post_init__(self) -> None:
        if self.windows is not None:
            sizes = {len(of_layer) for of_layer in self.windows.of_heads}
            if len(self.windows.of_heads) != self.num_layers or sizes != {self.num_kv_heads}:
                raise ValueError(
                    f"windows of {len(self.windows.of_heads)} layers for {self.num_layers} of "
                    f"{self.num_kv_heads} KV heads"
                )

    @property
    def different_windows(self) -> tuple[Window | None, ...]:
        """The windows that plans are made for; none where all heads see all tokens."""
        return self.windows.windows if self.windows is not None else ()

    def head_windows(self, layer: Int32[Array, ""]) -> Int32[Array, " Hkv"] | None:
        """Which of `different_windows` each KV head of a layer has; None where there are none."""
        if self.windows is None:
            return None
        return jnp.asarray(self.windows.of_heads, jnp.int32)[layer]

    def window_sizes(
        self, layer: Int32[Array, ""]
    ) -> tuple[Int32[Array, " Hkv"], Int32[Array, " Hkv"]] | None:
        """Size and sinks of the window that each KV head of a layer has; None where there are no
        windows."""
        of_heads = self.head_windows(layer)
        if of_heads is None:
            return None
        windows = [window or EVERYTHING for window in self.different_windows]
        sizes = jnp.array([window.size for window in windows], jnp.int32)
        sinks = jnp.array([window.sinks for window in windows], jnp.int32)
        return sizes[of_heads], sinks[of_heads]

    def layer_window(
        self, layer: Int32[Array, ""]
    ) -> tuple[Int32[Array, ""], Int32[Array, ""]] | None:
        """Size and sinks of the window of a layer whose heads have one; None where there are no
        windows."""
        sizes = self.window_sizes(layer)
        return None if sizes is None else (sizes[0][0], sizes[1][0])

    @property
    def windows_of_heads(self) -> tuple[tuple[Window | None, ...], ...]:
        """The window of each KV head of each layer; None where it sees all tokens."""
        if self.windows is None:
            return ((None,) * self.num_kv_heads,) * self.num_layers
        windows = self.windows.windows
        return tuple(tuple(windows[index] for index in layer) for layer in self.windows.of_heads)

    @property
    def largest_window(self) -> Window | None:
        """The smallest that holds every window there is; None where there is none."""
        windows = [window for window in self.different_windows if window is not None]
        if not windows:
            return None
        return Window(*(max(getattr(one, of) for one in windows) for of in ("size", "sinks")))

    @property
    def attention(self) -> AttentionSpec:
        """The attention that reads it."""
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        return AttentionSpec.of(*sizes, scale=self.scale, softcap=self.softcap)

    @property
    def values_per_token(self) -> int:
        """Numbers that the cache keeps of a token: its keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def values_seen(self, tokens: int) -> int:
        """Numbers of a sequence of so many tokens that the next token's queries may see.

        What a pool has to keep of it that gives up what windows have left, to the token.
        """
        heads = [window or EVERYTHING for layer in self.windows_of_heads for window in layer]
        seen = sum(min(tokens, window.sinks + window.size) for window in heads)
        return 2 * self.head_dim * seen


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


@runtime_checkable
class ServableModel(Protocol):
    """A model that computes in another way where nothing is differentiated."""

    def for_serving(self, *, batch_invariant: bool) -> DecoderModel:
        """The same model, over the same arrays by the same names, as an engine is to run it.

        Args:
          batch_invariant: what it computes of a token, but for attention, is to be the same bits
            whatever else, and however much, is computed with it.

        Raises:
          ImplementationError: when it cannot be that here, with the reason.
        """
        ...


def for_serving(model: DecoderModel, *, batch_invariant: bool = False) -> DecoderModel:
    """The model as an engine is to run it: itself, unless it says otherwise.

    Raises:
      ImplementationError: for a model that is to be batch-invariant and cannot, or does not say
        how.
    """
    if isinstance(model, ServableModel):
        return model.for_serving(batch_invariant=batch_invariant)
    if batch_invariant:
        name = type(model).__name__
        raise ImplementationError(
            f"{name} does not say how to be batch-invariant: it has no `for_serving`"
        )
    return model
