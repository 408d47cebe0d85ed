"""What is known of a chunk's scores before its keys are read: the best that any of them may have.

Letters: n chunks, R queries, C tokens, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.codecs import AffineCodec, TensorCodec
from pallas_kernels.selection.asking import Asking


@runtime_checkable
class Estimate(Protocol):
    """How well a chunk scores, as far as is known of its keys."""

    def best(
        self,
        head: Int32[Array, ""],
        chunks: Int32[Array, "*rows n"],
        q: Float32[Array, "*rows R D"],
    ) -> Float32[Array, "*rows n R"]:
        """For each of these chunks and queries of a KV head."""
        ...


@dataclass(frozen=True)
class KeyScores:
    """By the scores of the keys themselves, as they are read by `gather(head, chunks)`, which
    gives `[*rows, n * C, D]`: of the best one, or of all of them `together`, the softmax of which
    is the attention that the chunk gets."""

    gather: Callable[[Int32[Array, ""], Int32[Array, "*rows n"]], Float32[Array, "*rows tokens D"]]
    together: bool = False

    def best(
        self,
        head: Int32[Array, ""],
        chunks: Int32[Array, "*rows n"],
        q: Float32[Array, "*rows R D"],
    ) -> Float32[Array, "*rows n R"]:
        """See `Estimate`."""
        keys = self.gather(head, chunks)
        scores = jnp.einsum("...td,...rd->...tr", keys, q, precision=lax.Precision.HIGHEST)
        by_chunk = scores.reshape(*chunks.shape, -1, q.shape[-2])
        return jax.nn.logsumexp(by_chunk, axis=-2) if self.together else by_chunk.max(axis=-2)


@dataclass(frozen=True)
class KeyBounds:
    """What a score can be at most: of each channel the larger of what its least number and its
    largest give (Quest, arXiv 2406.10774, section 3.3)."""

    bounds: Float[Array, "L Hkv N 2 D"]
    layer: Int32[Array, ""]

    def best(
        self,
        head: Int32[Array, ""],
        chunks: Int32[Array, "*rows n"],
        q: Float32[Array, "*rows R D"],
    ) -> Float32[Array, "*rows n R"]:
        """See `Estimate`."""
        ends = self.bounds.at[self.layer, head, chunks].get(mode="promise_in_bounds")
        both = ends.astype(jnp.float32).reshape(*chunks.shape, -1)
        signed = jnp.concatenate([jnp.minimum(q, 0), jnp.maximum(q, 0)], axis=-1)
        return jnp.einsum("...nd,...rd->...nr", both, signed, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True)
class CompiledEstimate:
    """The same of all chunks at once, by the kernel that is compiled for this machine's CPU.

    Attributes:
      known: the codes of all keys by `codec`, in chunks of `chunk_size` tokens, or their "bounds".
    """

    known: Mapping[str, Shaped[Array, "L Hkv N ..."]]
    layer: Int32[Array, ""]
    codec: AffineCodec | None = None
    chunk_size: int = 0

    @classmethod
    def of_codes(
        cls,
        codes: Mapping[str, Shaped[Array, "L Hkv N ..."]],
        layer: Int32[Array, ""],
        codec: TensorCodec,
        chunk_size: int,
    ) -> CompiledEstimate | None:
        """None of codes that the kernel does not score: it does those with scales for channels."""
        if isinstance(codec, AffineCodec) and codec.along == "tokens":
            return cls(codes, layer, codec, chunk_size)
        return None

    def shares(
        self, q: Float[Array, "A Hq D"], asking: Asking, attention: AttentionSpec
    ) -> Float32[Array, "A Hq P"]:
        """For each query that asks and each head the softmax of the best scores that any key of the
        chunks before it has, or may have; the same bits whoever else asks."""
        compiled = import_module("pallas_kernels.native.scores")
        how = {"codec": self.codec, "chunk_size": self.chunk_size}
        return compiled.chunk_shares(q, asking, self.known, self.layer, attention, **how)


def key_bounds(keys: Float[Array, "*chunks C D"]) -> Float32[Array, "*chunks 2 D"]:
    """The least and the largest number of each channel of a chunk's keys."""
    wide = jnp.nan_to_num(keys.astype(jnp.float32))
    return jnp.stack([wide.min(axis=-2), wide.max(axis=-2)], axis=-2)
