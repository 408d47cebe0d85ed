"""Small integers with a scale and a zero for each group: KIVI's quantisation (arXiv 2402.02750).

Asymmetric round-to-nearest (section 3.1 of the paper): `x = code * scale + zero`. Keys share a
group with other tokens' numbers of the same channel, because some channels are large for all
tokens; values with other channels of the same token (section 3.2). A group never leaves its chunk,
so what a chunk's codes are depends on nothing but the chunk.

The first token of a prompt is read by every later one, far more than any other (an attention sink,
arXiv 2309.17453), so its error counts most; KVQuant keeps it exact (arXiv 2401.18079, section 3.5).
A chunk does not know where it stands: here the first token of every chunk may have 4 bits more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Shaped, UInt8

from pallas_kernels.codecs.context import ChunkContext, Constants

GROUP = 64
"""With 32 there are twice as many scales, and an exact first chunk lowers the error more (measured
on SmolLM2-135M)."""
LARGEST = 32768.0
"""Larger numbers are stored as this one: twice it must fit float16, as what a group spans may."""


@dataclass(frozen=True)
class AffineCodec:
    """Codes of `bits` bits, a float16 scale and a float16 zero for each group.

    The first of the `8 // bits` equal parts that a chunk's tokens are divided into has the lowest
    bits of each byte, the second the next ones: decoding moves nothing between channels.

    Attributes:
      bits: 8, 4 or 2.
      along: what is grouped: "tokens" of one channel, or "channels" of one token.
      group: numbers that share scale and zero; None takes 64, or as many as divide both 64 and what
        there is.
      fine_first: whether the chunk's first token has 4 bits more: what its codes leave of each
        number, in sixteenths of a step.

    Raises:
      ValueError: for other bits, or a group below 2.
    """

    bits: int
    along: Literal["tokens", "channels"]
    group: int | None = None
    fine_first: bool = False

    def __post_init__(self):
        if self.bits not in (8, 4, 2):
            raise ValueError(f"codes have 8, 4 or 2 bits, not {self.bits}")
        if self.group is not None and self.group < 2:
            raise ValueError(f"a group has 2 numbers at least, not {self.group}")

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def problem(self, chunk_size: int, head_dim: int) -> str | None:
        """Why chunks of these sizes cannot be stored, if they cannot."""
        if chunk_size % self.per_byte:
            return f"{chunk_size} tokens do not fill bytes of {self.per_byte} codes"
        size = chunk_size if self.along == "tokens" else head_dim
        if size % self.group_of(size):
            return f"groups of {self.group} do not divide {size} {self.along}"
        if self.fine_first and head_dim % 2:
            return f"{head_dim} numbers of 4 bits do not fill bytes"
        return None

    def arrays(self, chunk_size: int, head_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What is stored of one chunk of one head."""
        if self.along == "tokens":
            groups = chunk_size // self.group_of(chunk_size), head_dim
        else:
            groups = chunk_size, head_dim // self.group_of(head_dim)
        arrays = {
            "codes": jax.ShapeDtypeStruct((chunk_size // self.per_byte, head_dim), jnp.uint8),
            "scale": jax.ShapeDtypeStruct(groups, jnp.float16),
            "zero": jax.ShapeDtypeStruct(groups, jnp.float16),
        }
        if self.fine_first:
            arrays["first"] = jax.ShapeDtypeStruct((head_dim // 2,), jnp.uint8)
        return arrays

    def encode(
        self, numbers: Float[Array, "*chunks C D"], context: ChunkContext | None = None
    ) -> dict[str, Shaped[Array, "*_"]]:
        """The arrays of each chunk.

        No code is further from its number than half its group's scale, and a group of equal numbers
        that float16 holds is stored exactly. NaN is stored as 0, and what is beyond `LARGEST` as
        that.
        """
        finite = jnp.clip(jnp.nan_to_num(numbers.astype(jnp.float32)), -LARGEST, LARGEST)
        grouped, axis = self._grouped(finite)
        levels = 2.0**self.bits - 1
        zero = _round_down(grouped.min(axis=axis))
        span = grouped.max(axis=axis) - zero.astype(jnp.float32)
        scale = _round_up(span / levels)
        divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
        steps = (grouped - _spread(zero, axis)) / jnp.expand_dims(divisor, axis)
        nearest = jnp.clip(jnp.round(steps), 0, levels)
        codes = self._pack(nearest.astype(jnp.uint8).reshape(numbers.shape))
        stored = {"codes": codes, "scale": scale, "zero": zero}
        if self.fine_first:
            stored["first"] = _pack_rest((steps - nearest).reshape(numbers.shape)[..., 0, :])
        return stored

    def decode(
        self, stored: dict[str, Shaped[Array, "*_"]], constants: Constants | None = None
    ) -> Float32[Array, "*chunks C D"]:
        """The numbers of each chunk."""
        codes = self._unpack(stored["codes"])
        steps = codes.astype(jnp.float32)
        if self.fine_first:
            rest = _unpack_rest(stored["first"])[..., None, :]
            first = jnp.arange(codes.shape[-2], dtype=jnp.int32)[:, None] == 0
            steps = steps + jnp.where(first.reshape(*(1,) * (steps.ndim - 2), -1, 1), rest, 0)
        grouped, axis = self._grouped(steps)
        numbers = grouped * _spread(stored["scale"], axis) + _spread(stored["zero"], axis)
        return numbers.reshape(codes.shape)

    def _grouped(self, numbers: Shaped[Array, "*chunks C D"]) -> tuple[Array, int]:
        """The numbers with an axis for those of one group, and which axis that is."""
        *chunks, tokens, channels = numbers.shape
        if self.along == "tokens":
            return numbers.reshape(*chunks, -1, self.group_of(tokens), channels), -2
        return numbers.reshape(*chunks, tokens, -1, self.group_of(channels)), -1

    def group_of(self, size: int) -> int:
        """Numbers that share scale and zero, of this many tokens or channels."""
        return math.gcd(size, GROUP) if self.group is None else self.group

    def _pack(self, codes: UInt8[Array, "*chunks C D"]) -> UInt8[Array, "*chunks C_bytes D"]:
        *chunks, tokens, channels = codes.shape
        parts = codes.reshape(*chunks, self.per_byte, tokens // self.per_byte, channels)
        return (parts << self._shifts(parts.ndim)).sum(axis=-3, dtype=jnp.uint8)

    def _unpack(self, packed: UInt8[Array, "*chunks C_bytes D"]) -> UInt8[Array, "*chunks C D"]:
        if self.bits == 8:
            return packed
        *chunks, rows, channels = packed.shape
        parts = packed[..., None, :, :]
        parts = (parts >> self._shifts(parts.ndim)) & jnp.uint8(2**self.bits - 1)
        return parts.reshape(*chunks, rows * self.per_byte, channels)

    def _shifts(self, ndim: int) -> UInt8[Array, "*ones parts 1 1"]:
        shifts = jnp.arange(self.per_byte, dtype=jnp.uint8) * self.bits
        return shifts.reshape(*(1,) * (ndim - 3), -1, 1, 1)


def _pack_rest(rest: Float32[Array, "*chunks D"]) -> UInt8[Array, "*chunks D_bytes"]:
    """Parts of a step, from -1/2 to 1/2, each as the sixteenth that it lies in; those of the first
    half of the channels are the low bits."""
    parts = jnp.clip(jnp.floor((rest + 0.5) * 16), 0, 15).astype(jnp.uint8)
    low, high = jnp.split(parts, 2, axis=-1)
    return low | (high << jnp.uint8(4))


def _unpack_rest(packed: UInt8[Array, "*chunks D_bytes"]) -> Float32[Array, "*chunks D"]:
    """The middle of each sixteenth, which no rounding touches when a code is added."""
    parts = jnp.concatenate([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=-1)
    return (parts.astype(jnp.float32) - 7.5) / 16


def _spread(values: Float16[Array, "*_"], axis: int) -> Float32[Array, "*_"]:
    """A number of each group, to be used with all numbers of it."""
    return jnp.expand_dims(values.astype(jnp.float32), axis)


def _round_down(values: Float32[Array, "*shape"]) -> Float16[Array, "*shape"]:
    """The largest float16 that is not larger."""
    near = values.astype(jnp.float16)
    below = jnp.nextafter(near, jnp.float16(-jnp.inf))
    return jnp.where(near.astype(jnp.float32) > values, below, near)


def _round_up(values: Float32[Array, "*shape"]) -> Float16[Array, "*shape"]:
    """The smallest float16 that is not smaller."""
    return -_round_down(-values)
