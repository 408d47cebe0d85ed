"""Codes of a calibrated codebook, with the largest errors stored apart: KVQuant (arXiv 2401.18079).

A number is scaled to lie between -1 and 1 and stored as the nearest entry of a codebook, which was
fitted to a layer's keys or values (section 3.3 of the paper, nuqX). Keys are scaled channel by
channel, by ranges that were calibrated (3.1), before they are rotated, since rotation mixes
channels that differ in size (3.2). Values are scaled token by token. One number in a hundred is an
outlier and stored as it is (3.4); the paper's grow with the text, here a chunk has room for a fixed
number of them. The first token, which all later ones read (3.5), is stored as it is: a chunk's
first, whichever chunk it is.

Keys are given and asked for rotated. They are turned back before they are encoded, by angles that
follow from where the chunk stands, and turned again when they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped, UInt8

from pallas_kernels.codecs.context import ChunkContext, Constants
from pallas_kernels.rotation import rotate_pairs

_PLANES = {4: (4,), 3: (2, 1), 2: (2,)}
"""The bits of a code that lie in a byte together, lowest first."""


@dataclass(frozen=True)
class CodebookCodec:
    """Codes of `bits` bits; needs the constants of its model, and for keys where a chunk stands.

    Constants, of each layer and KV head: "codebook", its 2^bits entries in ascending order; for
    "tokens" "low" and "high", the range of each channel; where keys are rotated "frequencies", the
    radians a token of each pair of dimensions, and empty where they are not.

    Attributes:
      bits: 4, 3 or 2.
      along: what shares a scale: "tokens" of one channel, whose range is calibrated, or "channels"
        of one token, whose range is stored.
      outliers: share of a chunk's numbers that are stored as they are, in float16: those that their
        codes miss by most, or for "channels" those furthest from their token's mean, in standard
        deviations, which then do not count for its range.
      first_exact: whether all of the first token is.
      before_rotation: whether rotated numbers are turned back before they are encoded.

    Raises:
      ValueError: for other bits, or a share that is not in [0, 1).
    """

    bits: int
    along: Literal["tokens", "channels"]
    outliers: float = 0.01
    first_exact: bool = True
    before_rotation: bool = False

    def __post_init__(self):
        if self.bits not in _PLANES:
            raise ValueError(f"codes have 4, 3 or 2 bits, not {self.bits}")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"a share of outliers is at least 0 and below 1, not {self.outliers}")

    def problem(self, chunk_size: int, head_dim: int) -> str | None:
        """Why chunks of these sizes cannot be stored, if they cannot."""
        codes = max(8 // bits for bits in _PLANES[self.bits])
        if chunk_size % codes:
            return f"{chunk_size} tokens do not fill bytes of {codes} codes"
        if chunk_size * head_dim > 2**16:
            return f"16 bits do not find outliers among {chunk_size * head_dim:,} numbers"
        return None

    def arrays(self, chunk_size: int, head_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What is stored of one chunk of one head."""
        arrays = {
            f"codes_{bits}": jax.ShapeDtypeStruct((chunk_size * bits // 8, head_dim), jnp.uint8)
            for bits in _PLANES[self.bits]
        }
        if self.along == "channels":
            arrays["low"] = arrays["high"] = jax.ShapeDtypeStruct((chunk_size, 1), jnp.float16)
        count = self._count(chunk_size * head_dim)
        if count:
            arrays["outliers"] = jax.ShapeDtypeStruct((count,), jnp.float16)
            arrays["places"] = jax.ShapeDtypeStruct((count,), jnp.uint16)
        if self.first_exact:
            arrays["first"] = jax.ShapeDtypeStruct((head_dim,), jnp.float16)
        if self.before_rotation:
            arrays["begin"] = jax.ShapeDtypeStruct((), jnp.int32)
        return arrays

    def constants(self, head_dim: int) -> dict[str, int | None]:
        """Names and sizes of the constants of a head that it needs; how many pairs turn, the model
        says."""
        sizes: dict[str, int | None] = {"codebook": 2**self.bits}
        if self.along == "tokens":
            sizes |= {"low": head_dim, "high": head_dim}
        if self.before_rotation:
            sizes["frequencies"] = None
        return sizes

    def lacking(self, constants: Mapping[str, np.ndarray], head_dim: int) -> str | None:
        """Why these `[L, Hkv, n]` are not the constants of a model whose heads have D numbers, if
        they are not."""
        for name, size in self.constants(head_dim).items():
            if name not in constants:
                return f"it was not calibrated: there is no {name!r}"
            found = constants[name].shape[-1]
            if size is not None and found != size:
                return f"it was calibrated for another model: {name!r} has {found:,}, not {size:,}"
        return None

    def _count(self, numbers: int) -> int:
        return math.ceil(self.outliers * numbers)

    def encode(
        self, numbers: Float[Array, "*chunks C D"], context: ChunkContext | None = None
    ) -> dict[str, Shaped[Array, "*_"]]:
        """The arrays of each chunk; NaN is stored as 0, and what is beyond float16 as its largest.

        Raises:
          ValueError: without a context.
        """
        if context is None:
            raise ValueError("codes of a codebook need the context of the chunks")
        constants = context.constants
        exact = _within_float16(jnp.nan_to_num(numbers.astype(jnp.float32)))
        stored: dict[str, Array] = {}
        if self.before_rotation:
            stored["begin"] = context.begin
            turned = _turn(exact, context.begin, constants["frequencies"], back=True)
            exact = _within_float16(turned)
        if self.first_exact:
            stored["first"] = exact[..., 0, :].astype(jnp.float16)
        if self.along == "channels":
            outlying, low, high = self._token_ranges(exact)
            stored |= {"low": low, "high": high}
        codes = _nearest(_scaled(exact, *self._range(stored, constants)), constants["codebook"])
        if self.along == "tokens":
            decoded = self._looked_up(codes, stored, constants)
            outlying = self._furthest(jnp.abs(decoded - exact))
        if outlying is not None:
            flat = exact.reshape(*exact.shape[:-2], -1)
            stored["outliers"] = jnp.take_along_axis(flat, outlying, axis=-1).astype(jnp.float16)
            stored["places"] = outlying.astype(jnp.uint16)
        return stored | self._pack(codes)

    def decode(
        self, stored: dict[str, Shaped[Array, "*_"]], constants: Constants | None = None
    ) -> Float32[Array, "*chunks C D"]:
        """The numbers of each chunk.

        Raises:
          ValueError: without constants.
        """
        if constants is None:
            raise ValueError("codes of a codebook need the constants of their heads")
        numbers = self._looked_up(self._unpack(stored), stored, constants)
        if "outliers" in stored:
            numbers = _put(numbers, stored["places"], stored["outliers"])
        if self.first_exact:
            first = stored["first"].astype(jnp.float32)[..., None, :]
            token = jnp.arange(numbers.shape[-2], dtype=jnp.int32)
            token = token.reshape(*(1,) * (numbers.ndim - 2), -1, 1)
            numbers = jnp.where(token == 0, first, numbers)
        if self.before_rotation:
            numbers = _turn(numbers, stored["begin"], constants["frequencies"], back=False)
        return numbers

    def _token_ranges(
        self, numbers: Float32[Array, "*chunks C D"]
    ) -> tuple[Int32[Array, "*chunks outliers"] | None, Array, Array]:
        """Places of outliers, and the range of each token's other numbers, of float16 each."""
        mean, deviation = (f(numbers, axis=-1, keepdims=True) for f in (jnp.mean, jnp.std))
        far = jnp.abs(numbers - mean) / jnp.where(deviation > 0, deviation, 1)
        outlying = self._furthest(far)
        within = jnp.ones(numbers.shape, bool)
        if outlying is not None:
            within = _put(jnp.ones(numbers.shape), outlying, jnp.zeros(outlying.shape)) > 0
        low = jnp.where(within, numbers, jnp.inf).min(axis=-1, keepdims=True)
        high = jnp.where(within, numbers, -jnp.inf).max(axis=-1, keepdims=True)
        some = low <= high  # of a token whose numbers are not all outliers
        low, high = (jnp.where(some, x, 0).astype(jnp.float16) for x in (low, high))
        return outlying, low, high

    def _furthest(self, far: Float32[Array, "*chunks C D"]) -> Array | None:
        """Places of a chunk's outliers: where `far` is largest, but not in a token that is exact
        anyway."""
        *chunks, tokens, channels = far.shape
        count = self._count(tokens * channels)
        if not count:
            return None
        if self.first_exact:
            far = far.at[..., 0, :].set(-1.0)
        return jax.lax.top_k(far.reshape(*chunks, -1), count)[1]

    def _range(self, stored: dict[str, Array], constants: Constants) -> tuple[Array, Array]:
        """The least and the largest number that codes stand for, float32, with axes for tokens and
        channels."""
        if self.along == "channels":
            return stored["low"].astype(jnp.float32), stored["high"].astype(jnp.float32)
        return constants["low"][..., None, :], constants["high"][..., None, :]

    def _looked_up(
        self, codes: UInt8[Array, "*chunks C D"], stored: dict[str, Array], constants: Constants
    ) -> Float32[Array, "*chunks C D"]:
        low, high = self._range(stored, constants)
        middle, half = (high + low) / 2, (high - low) / 2
        return _entries(codes, constants["codebook"]) * half + middle

    def _pack(self, codes: UInt8[Array, "*chunks C D"]) -> dict[str, UInt8[Array, "*_"]]:
        """Of each byte's codes the first is of the first of equal parts of the tokens."""
        *chunks, tokens, channels = codes.shape
        packed, done = {}, 0
        for bits in _PLANES[self.bits]:
            parts = codes.reshape(*chunks, 8 // bits, tokens * bits // 8, channels)
            parts = (parts >> jnp.uint8(done)) & jnp.uint8(2**bits - 1)
            packed[f"codes_{bits}"] = (parts << _shifts(bits, parts.ndim)).sum(
                axis=-3, dtype=jnp.uint8
            )
            done += bits
        return packed

    def _unpack(self, stored: dict[str, Array]) -> UInt8[Array, "*chunks C D"]:
        codes, done = None, 0
        for bits in _PLANES[self.bits]:
            packed = stored[f"codes_{bits}"][..., None, :, :]
            parts = (packed >> _shifts(bits, packed.ndim)) & jnp.uint8(2**bits - 1)
            *chunks, pieces, tokens, channels = parts.shape
            parts = parts.reshape(*chunks, pieces * tokens, channels) << jnp.uint8(done)
            codes = parts if codes is None else codes | parts
            done += bits
        assert codes is not None
        return codes


def _within_float16(numbers: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(numbers, -most, most)


def _shifts(bits: int, ndim: int) -> UInt8[Array, "*ones parts 1 1"]:
    shifts = jnp.arange(8 // bits, dtype=jnp.uint8) * bits
    return shifts.reshape(*(1,) * (ndim - 3), -1, 1, 1)


def _scaled(
    numbers: Float32[Array, "*chunks C D"], low: Float32[Array, "*_"], high: Float32[Array, "*_"]
) -> Float32[Array, "*chunks C D"]:
    """-1 for the lowest, 1 for the highest; 0 where they are the same."""
    half = (high - low) / 2
    return jnp.where(half > 0, (numbers - (high + low) / 2) / jnp.where(half > 0, half, 1), 0)


def _nearest(
    numbers: Float32[Array, "*chunks C D"], codebook: Float32[Array, "... entries"]
) -> UInt8[Array, "*chunks C D"]:
    """The index of the entry nearest to each."""
    between = (codebook[..., 1:] + codebook[..., :-1]) / 2
    codes = jnp.zeros(numbers.shape, jnp.uint8)
    for index in range(between.shape[-1]):
        codes += (numbers > between[..., index, None, None]).astype(jnp.uint8)
    return codes


def _entries(
    codes: UInt8[Array, "*chunks C D"], codebook: Float32[Array, "... entries"]
) -> Float32[Array, "*chunks C D"]:
    """The entry of each code: chosen bit by bit, since XLA looks nothing up in vectors on a CPU."""
    entries = [codebook[..., index, None, None] for index in range(codebook.shape[-1])]
    bit = 0
    while len(entries) > 1:
        odd: Bool[Array, "*chunks C D"] = (codes >> jnp.uint8(bit)) & jnp.uint8(1) == 1
        entries = [
            jnp.where(odd, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)
        ]
        bit += 1
    return entries[0]


def _put(
    numbers: Float32[Array, "*chunks C D"], places: Shaped[Array, "*_"], new: Float[Array, "*_"]
) -> Float32[Array, "*chunks C D"]:
    """With numbers at places of each chunk replaced."""
    *_, tokens, channels = numbers.shape
    count = places.shape[-1]
    # Not [chunks, C * D]: XLA on a CPU would then compute what is put into number by number.
    chunks = numbers.reshape(-1, tokens, channels)
    chunk = jnp.arange(len(chunks), dtype=jnp.int32)[:, None]
    places = places.reshape(-1, count).astype(jnp.int32)
    target = chunks.at[chunk, places // channels, places % channels]
    new = new.reshape(-1, count).astype(jnp.float32)
    put = target.set(new, mode="promise_in_bounds", unique_indices=True)
    return put.reshape(numbers.shape)


def _turn(
    numbers: Float32[Array, "*chunks C D"],
    begin: Int32[Array, "*chunks"],
    frequencies: Float32[Array, "... pairs"],
    *,
    back: bool,
) -> Float32[Array, "*chunks C D"]:
    """Rotated by where tokens stand, the chunks' first ones at `begin`; or turned back.

    The angle of a token is that of its chunk and that of its place in it, whose sines and cosines
    are few.
    """
    tokens = jnp.arange(numbers.shape[-2], dtype=jnp.float32)
    of_chunk = begin.astype(jnp.float32)[..., None, None] * frequencies[..., None, :]
    shape = (*(1,) * (numbers.ndim - 2), -1, 1)
    of_token = tokens.reshape(shape) * frequencies[..., None, :]
    cos_chunk, sin_chunk = _cos_and_sin(of_chunk)
    cos_token, sin_token = _cos_and_sin(of_token)
    cos = cos_chunk * cos_token - sin_chunk * sin_token
    sin = sin_chunk * cos_token + cos_chunk * sin_token
    return rotate_pairs(numbers, cos, -sin if back else sin)


def _cos_and_sin(
    angles: Float32[Array, "*shape"],
) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Looked up row by row once they are computed, so that XLA on a CPU does not compute them again
    for every number that is multiplied by them: that takes ten times as long."""
    rows = angles.reshape(math.prod(angles.shape[:-1]), angles.shape[-1])
    row = jnp.arange(len(rows), dtype=jnp.int32)
    both = jnp.concatenate([jnp.cos(rows), jnp.sin(rows)], axis=-1)
    both = both.at[row].get(mode="promise_in_bounds", unique_indices=True)
    cos, sin = jnp.split(both, 2, axis=-1)
    return cos.reshape(angles.shape), sin.reshape(angles.shape)
