"""Encoded chunks in a Triton kernel: what a codec stores of a tile's tokens, decoded in registers.

A byte has codes of several tokens of a chunk, one of each of the equal parts that the chunk is
divided into. A tile has tokens of one part; the tiles of a step have the same rows of every part,
so that each byte is read once.

Numbers are decoded in float32 and then rounded once, to the factors that the products of exact
chunks would have. The words of `pallas_kernels.triton_tiles` are used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float32, Int32, Shaped, UInt8

from pallas_kernels.codecs import AffineCodec, ScaledFloatCodec, TensorCodec
from pallas_kernels.targets import current_target
from pallas_kernels.triton_shape import KernelShape


@dataclass(frozen=True)
class ChunkRows:
    """Where some tokens are: their chunks, one or one for each, and their rows in a part of it."""

    chunk: Int32[Array, "*chunks"]  # counted from the run's first
    ids: Int32[Array, "*chunks"]  # in the pool
    rows: Int32[Array, "*rows"]

    def column(self) -> Int32[Array, "*column"]:
        """The chunks' ids, to be used with all channels of a token."""
        return self.ids[:, None] if self.ids.ndim else self.ids


@dataclass(frozen=True)
class CodedHead:
    """What a codec stores of the keys of one head, or the values, and which of it a step reads.

    Attributes:
      arrays: references to what is stored of all layers and heads, by name.
      place: where tokens of a tile are, by their index in it.
    """

    arrays: dict[str, Any]
    layer: Int32[Array, ""]
    head: Int32[Array, ""]
    place: Callable[[Int32[Array, "*slots"]], ChunkRows]
    shape: KernelShape

    def tokens(self) -> ChunkRows:
        """Where all tokens of the tile are."""
        return self.place(jnp.arange(self.shape.key_tile, dtype=jnp.int32))

    def dims(self) -> Int32[Array, " Dp"]:
        return jnp.arange(self.shape.padded_dim, dtype=jnp.int32)

    def load(
        self,
        name: str,
        ids: Int32[Array, "*ids"],
        *index: Int32[Array, "*_"],
        mask: Bool[Array, "*mask"] | None = None,
    ) -> Shaped[Array, "*shape"]:
        """What is stored of chunks at an index; zeros where `mask` is false."""
        where = self.arrays[name].at[self.layer, self.head, ids, *index]
        if mask is None:
            return plt.load(where)
        size = jnp.broadcast_shapes(ids.shape, *(places.shape for places in index))
        return plt.load(where, mask=jnp.broadcast_to(mask, size), other=0)

    def load_codes(self, part: int) -> Shaped[Array, "T Dp"]:
        """The rows of a part, all channels of them."""
        here, dims, shape = self.tokens(), self.dims()[None], self.shape
        rows = (part * shape.part_tokens + here.rows)[:, None]
        inside = None if shape.padded_dim == shape.head_dim else dims < shape.head_dim
        return self.load("codes", here.column(), rows, dims, mask=inside)


def decoder(codec: TensorCodec, head: CodedHead) -> Callable[[int], Float32[Array, "T Dp"]]:
    """What gives the tile of each part, decoded; it is zero behind head_dim."""
    if isinstance(codec, AffineCodec):
        return _affine(codec, head)
    assert isinstance(codec, ScaledFloatCodec)  # others are `unsupported`
    return lambda part: _scaled_float(codec, head, part)


def _scaled_float(codec: ScaledFloatCodec, head: CodedHead, part: int) -> Float32[Array, "T Dp"]:
    ids = head.tokens().column()
    only = jnp.zeros_like(ids)
    numbers = _as_float32(head.load_codes(part), codec.dtype)
    return numbers * head.load("scale", ids, only, only)


def _as_float32(codes: UInt8[Array, "T Dp"], dtype: str) -> Float32[Array, "T Dp"]:
    """The numbers of 8-bit floats; GPUs before compute capability 8.9 convert no float8_e4m3fn.

    There its sign, exponent and fraction are put where float16 has them, whose exponents count from
    8 more, in 6 instructions for a number instead of half of one.
    """
    capability = current_target().compute_capability
    if dtype != "float8_e4m3fn" or capability is None or capability >= (8, 9):
        return lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)
    bits = codes.astype(jnp.uint16)
    sign, others = bits & jnp.uint16(0x80), bits & jnp.uint16(0x7F)
    half = (sign << jnp.uint16(8)) | (others << jnp.uint16(7))
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2**8


def _affine(codec: AffineCodec, head: CodedHead) -> Callable[[int], Float32[Array, "T Dp"]]:
    apart = head.shape.parts // codec.per_byte  # parts that have no byte in common
    packed = cache(head.load_codes)
    groups = _token_groups if codec.along == "tokens" else _channel_groups

    def tile(part: int) -> Float32[Array, "T Dp"]:
        codes = packed(part % apart)
        if codec.bits < 8:
            codes = (codes >> jnp.uint8(part // apart * codec.bits)) & jnp.uint8(2**codec.bits - 1)
        steps = codes.astype(jnp.float32)
        if codec.fine_first and part == 0:
            steps = steps + _rest_of_first(head)
        grouped, scale, zero = groups(codec, head, part)
        return (steps.reshape(grouped) * scale + zero).reshape(steps.shape)

    return tile


Groups = tuple[tuple[int, ...], Float32[Array, "*groups"], Float32[Array, "*groups"]]
"""The shape of a tile with an axis for a group's numbers, and the scale and zero of each.

Where a tile has one group in an axis they are loaded without it: Triton computes in the layout of a
two-dimensional load, and in that of a row of channels a thread has 64 bytes to load one by one.
"""


def _token_groups(codec: AffineCodec, head: CodedHead, part: int) -> Groups:
    shape, dims = head.shape, head.dims()
    group = codec.group_of(shape.chunk_size)
    together = min(group, shape.part_tokens, shape.key_tile)  # rows of a tile in one group
    count = shape.key_tile // together
    inside = None if shape.padded_dim == shape.head_dim else dims < shape.head_dim

    def load(name: str) -> Float32[Array, "*groups"]:
        if count == 1:
            first = head.place(jnp.int32(0))
            of_chunk = (part * shape.part_tokens + first.rows) // group
            return head.load(name, first.ids, of_chunk, dims, mask=inside).astype(jnp.float32)[None]
        firsts = head.place(together * jnp.arange(count, dtype=jnp.int32))
        of_chunk = ((part * shape.part_tokens + firsts.rows) // group)[:, None]
        mask = None if inside is None else inside[None]
        numbers = head.load(name, firsts.column(), of_chunk, dims[None], mask=mask)
        return numbers.astype(jnp.float32)[:, None]

    grouped = (shape.key_tile,) if count == 1 else (count, together)
    return (*grouped, shape.padded_dim), load("scale"), load("zero")


def _channel_groups(codec: AffineCodec, head: CodedHead, part: int) -> Groups:
    shape, here = head.shape, head.tokens()
    group = codec.group_of(shape.head_dim)
    count = shape.padded_dim // group
    rows = part * shape.part_tokens + here.rows

    def load(name: str) -> Float32[Array, "*groups"]:
        if count == 1:
            numbers = head.load(name, here.ids, rows, jnp.int32(0))
            return numbers.astype(jnp.float32)[:, None]
        of_token = jnp.arange(count, dtype=jnp.int32)[None]
        mask = None if shape.padded_dim == shape.head_dim else of_token * group < shape.head_dim
        numbers = head.load(name, here.column(), rows[:, None], of_token, mask=mask)
        return numbers.astype(jnp.float32)[:, :, None]

    grouped = (shape.padded_dim,) if count == 1 else (count, group)
    return (shape.key_tile, *grouped), load("scale"), load("zero")


def _rest_of_first(head: CodedHead) -> Float32[Array, "T Dp"]:
    """What the code of each chunk's first token leaves, in steps; 0 for the other tokens."""
    here, dims, head_dim = head.tokens(), head.dims(), head.shape.head_dim
    is_first = (here.rows == 0)[:, None]
    shift = jnp.where(dims < head_dim // 2, 0, 4).astype(jnp.uint8)
    place, inside = dims % (head_dim // 2), dims < head_dim
    if here.ids.ndim:  # of the chunks of all rows only theirs that are first
        place, shift, inside = place[None], shift[None], inside[None] & is_first
    rest = (head.load("first", here.column(), place, mask=inside) >> shift) & jnp.uint8(15)
    return jnp.where(is_first, (rest.astype(jnp.float32) - 7.5) / 16, 0)
