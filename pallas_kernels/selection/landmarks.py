"""What is kept of each full chunk for those who choose, beside its keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.codecs import AffineCodec
from pallas_kernels.coded_kv import CodedKV, LayerKV
from pallas_kernels.selection.estimates import (
    CompiledEstimate,
    Estimate,
    KeyBounds,
    KeyScores,
    key_bounds,
)
from pallas_kernels.selection.selector import ChunkSelector

KEY_CODES = AffineCodec(4, "tokens")
"""What "scores" keeps of a chunk's keys, where the pool has no codes of its own. By 2 bits they
find less than four fifths of what has to be copied, by 4 bits nearly all (SmolLM2-135M)."""


@dataclass(frozen=True)
class Landmarks:
    """What is known of a chunk, by name of an array; nothing where the pool itself will do.

    Attributes:
      kind: "codes" of all keys, or their "bounds"; or nothing, where "keys" are read in the pool
        to find the best of a chunk, or "all keys" to find the attention that it gets.
    """

    kind: str

    @classmethod
    def of(cls, selector: ChunkSelector, *, encoded: bool) -> Landmarks:
        """Those that a selector needs; with `encoded`, in a pool whose chunks are codes."""
        if selector.policy == "bounds":
            return cls("bounds")
        if selector.policy == "scores" and not encoded:
            return cls("codes")
        return cls("all keys" if selector.policy == "oracle" else "keys")

    def problem(self, chunk_size: int, head_dim: int) -> str | None:
        """Why there can be none of such chunks, in words; None if there can."""
        return KEY_CODES.problem(chunk_size, head_dim) if self.kind == "codes" else None

    def arrays(self, chunk_size: int, head_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of what is kept of one chunk of one head."""
        if self.kind == "codes":
            return KEY_CODES.arrays(chunk_size, head_dim)
        if self.kind == "bounds":
            return {"bounds": jax.ShapeDtypeStruct((2, head_dim), jnp.float32)}
        return {}

    def bytes(self, chunk_size: int, head_dim: int) -> int:
        """Bytes of what is kept of one chunk of one head."""
        arrays = self.arrays(chunk_size, head_dim).values()
        return sum(array.size * array.dtype.itemsize for array in arrays)

    def make(self, keys: Float[Array, "*chunks C D"]) -> dict[str, Shaped[Array, "*_"]]:
        """What is kept of each chunk."""
        if self.kind == "codes":
            return KEY_CODES.encode(keys)
        return {"bounds": key_bounds(keys)} if self.kind == "bounds" else {}

    def estimate(
        self,
        landmarks: dict[str, Shaped[Array, "L Hkv N ..."]],
        stored: LayerKV,
        layer: Int32[Array, ""],
    ) -> Estimate:
        """How chunks of a layer score by what is kept of them."""
        if self.kind == "bounds":
            return KeyBounds(landmarks["bounds"], layer)
        if self.kind in {"keys", "all keys"}:
            return KeyScores(stored.gather_keys, together=self.kind == "all keys")

        def gather(head, chunks):
            def of_chunks(array):
                return array.at[layer, head, chunks].get(mode="promise_in_bounds")

            keys = KEY_CODES.decode(jax.tree.map(of_chunks, landmarks))
            return keys.reshape(*chunks.shape[:-1], -1, keys.shape[-1])

        return KeyScores(gather)

    def compiled_estimate(
        self,
        landmarks: dict[str, Shaped[Array, "L Hkv N ..."]],
        stored: LayerKV,
        layer: Int32[Array, ""],
    ) -> CompiledEstimate | None:
        """The same by the kernel that is compiled for this CPU; None of what it does not look at:
        keys as they are, and codes without scales for channels."""
        if self.kind == "bounds":
            return CompiledEstimate(landmarks, layer)
        if self.kind == "codes":
            return CompiledEstimate.of_codes(landmarks, layer, KEY_CODES, stored.chunk_size)
        if self.kind == "keys" and isinstance(stored, CodedKV):
            codec = stored.codec.keys
            return CompiledEstimate.of_codes(stored.keys, layer, codec, stored.chunk_size)
        return None
