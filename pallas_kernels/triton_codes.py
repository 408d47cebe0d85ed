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
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float32, Int32, Shaped, UInt8

from pallas_kernels.codecs import AffineCodec, ScaledFloatCodec, TensorCodec
from pallas_kernels.triton_shape import KernelShape


@dataclass(frozen=True)
class ChunkRows:
    """Where some tokens are: their chunks, one or one for each, and their rows in a part of it."""

    chunk: Int32[Array, ""] | Int32[Array, " T"]  # counted from the run's first
    ids: Int32[Array, ""] | Int32[Array, "T 1"]  # in the pool
    rows: Int32[Array, " T"]


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
    place: Callable[[Int32[Array, " T"]], ChunkRows]
    shape: KernelShape

    @property
    def tokens(self) -> ChunkRows:
        """Where all tokens of the tile are."""
        return self.place(jnp.arange(self.shape.key_tile, dtype=jnp.int32))

    @property
    def dims(self) -> Int32[Array, "1 Dp"]:
        return jnp.arange(self.shape.padded_dim, dtype=jnp.int32)[None]

    @property
    def real(self) -> Bool[Array, "1 Dp"] | None:
        """Which of `dims` are not padding; None for all."""
        shape = self.shape
        return None if shape.padded_dim == shape.head_dim else self.dims < shape.head_dim

    def load(
        self, name: str, chunks: ChunkRows, *index: Any, mask: Bool[Array, "*mask"] | None = None
    ) -> Shaped[Array, "*shape"]:
        """What is stored of the chunks at an index; zeros where `mask` is false."""
        size = jnp.broadcast_shapes(chunks.ids.shape, *map(jnp.shape, index))
        where = self.arrays[name].at[self.layer, self.head, chunks.ids, *index]
        if mask is None:
            return plt.load(where)
        return plt.load(where, mask=jnp.broadcast_to(mask, size), other=0)


def decoder(codec: TensorCodec, head: CodedHead) -> Callable[[int], Float32[Array, "T Dp"]]:
    """What gives the tile of each part, decoded; it is zero behind head_dim."""
    if isinstance(codec, AffineCodec):
        return _affine(codec, head)
    assert isinstance(codec, ScaledFloatCodec)  # others are `unsupported`
    return lambda part: _scaled_float(head, part)


def _scaled_float(head: CodedHead, part: int) -> Float32[Array, "T Dp"]:
    here = head.tokens
    rows = part * head.shape.part_tokens + here.rows
    codes = head.load("codes", here, rows[:, None], head.dims, mask=head.real)
    only = jnp.zeros_like(here.ids)
    return codes.astype(jnp.float32) * head.load("scale", here, only, only)


def _affine(codec: AffineCodec, head: CodedHead) -> Callable[[int], Float32[Array, "T Dp"]]:
    shape, here = head.shape, head.tokens
    apart = shape.parts // codec.per_byte  # parts that have no byte in common
    groups = _token_groups if codec.along == "tokens" else _channel_groups

    @cache
    def packed(part: int) -> UInt8[Array, "T Dp"]:
        rows = part * shape.part_tokens + here.rows
        return head.load("codes", here, rows[:, None], head.dims, mask=head.real)

    def tile(part: int) -> Float32[Array, "T Dp"]:
        codes = packed(part % apart)
        if codec.bits < 8:
            codes = (codes >> jnp.uint8(part // apart * codec.bits)) & jnp.uint8(2**codec.bits - 1)
        steps = codes.astype(jnp.float32)
        if codec.fine_first and part == 0:
            steps = steps + _rest_of_first(head)
        grouped, scale, zero = groups(codec, head, part)
        numbers = steps.reshape(grouped) * scale + zero
        return numbers.reshape(steps.shape)

    return tile


Groups = tuple[tuple[int, ...], Float32[Array, "..."], Float32[Array, "..."]]
"""The shape of a tile with an axis for a group's numbers, and the scale and zero of each."""


def _token_groups(codec: AffineCodec, head: CodedHead, part: int) -> Groups:
    shape = head.shape
    group = codec.group_of(shape.chunk_size)
    together = min(group, shape.part_tokens, shape.key_tile)  # rows of a tile in one group
    count = shape.key_tile // together
    firsts = head.place(together * jnp.arange(count, dtype=jnp.int32))
    of_chunk = (part * shape.part_tokens + firsts.rows) // group
    scale, zero = (
        head.load(name, firsts, of_chunk[:, None], head.dims, mask=head.real).astype(jnp.float32)
        for name in ("scale", "zero")
    )
    if count == 1:
        return (shape.key_tile, shape.padded_dim), scale, zero
    return (count, together, shape.padded_dim), scale[:, None], zero[:, None]


def _channel_groups(codec: AffineCodec, head: CodedHead, part: int) -> Groups:
    shape, here = head.shape, head.tokens
    group = codec.group_of(shape.head_dim)
    count = shape.padded_dim // group
    of_token = jnp.arange(count, dtype=jnp.int32)[None]
    rows = part * shape.part_tokens + here.rows
    real = None if head.real is None else of_token < shape.head_dim // group
    scale, zero = (
        head.load(name, here, rows[:, None], of_token, mask=real).astype(jnp.float32)
        for name in ("scale", "zero")
    )
    if count == 1:
        return (shape.key_tile, shape.padded_dim), scale, zero
    return (shape.key_tile, count, group), scale[:, :, None], zero[:, :, None]


def _rest_of_first(head: CodedHead) -> Float32[Array, "T Dp"]:
    """What the code of each chunk's first token leaves, in steps; 0 for the other tokens."""
    here, dims, half = head.tokens, head.dims, head.shape.head_dim // 2
    is_first = (here.rows == 0)[:, None]
    of_each = here.ids.ndim > 0  # chunks: do not read theirs again and again
    inside = dims < head.shape.head_dim
    packed = head.load("first", here, dims % half, mask=is_first & inside if of_each else inside)
    rest = (packed >> jnp.where(dims < half, 0, 4).astype(jnp.uint8)) & jnp.uint8(15)
    return jnp.where(is_first, (rest.astype(jnp.float32) - 7.5) / 16, 0)
