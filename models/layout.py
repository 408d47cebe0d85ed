"""Where a checkpoint keeps each weight of the decoder, and how it stores it.

A layout names tensors by stem: the tensors are the stem's `.weight`, and `.bias` where there is
one. A tensor holds one part or several, one after another. A part is a weight of the decoder, but
`qkv` has the parts `q`, `k` and `v`, and `gate_up` the parts `gate` and `up`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.config import DecoderConfig
from models.weights import BLOCKS, Weight, block_weights, decoder_weights

ROWS_AT_ONCE = 16

Index = tuple[Any, ...]
JOINED: Mapping[str, Mapping[str, Index]] = {
    "qkv": {
        "q": (..., slice(None, -2), slice(None)),
        "k": (..., -2, slice(None)),
        "v": (..., -1, slice(None)),
    },
    "gate_up": {"gate": (..., 0, slice(None)), "up": (..., 1, slice(None))},
}
"""The weights of the decoder that consist of several parts, and the index of each part."""


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint of one architecture.

    Attributes:
      tensors: the parts of each stem; `{}` is the number of the layer.
      prefix: of stems; some files leave it out.
      ignored: patterns of the names of tensors that the decoder does not need.
      input_first: matrices are `[in, out]`, not `[out, in]`, except the unembedding.
      norm_offset: added to the stored scale of each norm.
      position_offset: how many rows precede that of position 0.
      interleaved: rotary embedding pairs neighbouring dimensions of queries and keys, as llama.cpp
        does, and not the halves of a head.
    """

    tensors: dict[str, tuple[str, ...]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    input_first: bool = False
    norm_offset: float = 0.0
    position_offset: int = 0
    interleaved: bool = False

    def without_prefix(self) -> Layout:
        tensors = {stem.removeprefix(self.prefix): parts for stem, parts in self.tensors.items()}
        return replace(self, tensors=tensors, prefix="")

    def is_transposed(self, part: str, inputs: int) -> bool:
        """Whether a part with `inputs` axes of input is stored `[in, out]`."""
        return self.input_first and inputs > 0 and part != "unembedding"

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


@dataclass(frozen=True)
class Piece:
    """Rows of a checkpoint's tensor that are one part of a weight of the decoder.

    Attributes:
      tensor: the tensor's name.
      shape: the tensor's shape, as stored.
      rows: which rows of the tensor, when its outputs are on the first axis.
      index: of the part in the decoder's weight, of one layer.
      part: the part's name.
      inputs: number of axes of a projection's input, which are the first of the weight and the last
        of the tensor; 0 for a part that is not a projection.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: slice
    index: Index
    part: str
    inputs: int


def pieces(layout: Layout, config: DecoderConfig, name: str, layer: int | None) -> list[Piece]:
    """The pieces of the decoder's weight `name`, of one layer or (None) outside the layers."""
    weights = decoder_weights(config) if layer is None else block_weights(config)
    weight = weights.by_name()[name]
    base, suffix = (name[:-5], ".bias") if name.endswith("_bias") else (name, ".weight")
    found = []
    for part, index in JOINED.get(base, {base: (...,)}).items():
        stem, parts = next((s, p) for s, p in layout.tensors.items() if part in p)
        sizes = [_stored_shape(layout, config, weight, base, other)[0] for other in parts]
        begin = sum(sizes[: parts.index(part)])
        rows = slice(begin, begin + sizes[parts.index(part)])
        whole = (sum(sizes), *_stored_shape(layout, config, weight, base, part)[1:])
        if layout.is_transposed(part, weight.inputs):
            whole = whole[::-1]
        tensor = stem.format(layer) + suffix
        found.append(Piece(tensor, whole, rows, index, part, weight.inputs))
    return found


def expected_shapes(layout: Layout, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this layout and config must hold."""
    return {
        piece.tensor: piece.shape
        for name, layer in every_weight(config)
        for piece in pieces(layout, config, name, layer)
    }


def every_weight(config: DecoderConfig) -> Iterator[tuple[str, int | None]]:
    """Names of the weights outside the layers, then of each layer's."""
    for name in decoder_weights(config).by_name():
        if not name.startswith(BLOCKS):
            yield name, None
    for layer in range(config.num_layers):
        for name in block_weights(config).by_name():
            yield name, layer


def _stored_shape(
    layout: Layout, config: DecoderConfig, weight: Weight, base: str, part: str
) -> tuple[int, ...]:
    """The shape of a part of `weight` in a checkpoint, outputs first."""
    index = JOINED.get(base, {}).get(part, (...,))
    shape = np.broadcast_to(np.empty(()), weight.shape)[index].shape
    if weight.inputs:
        return math.prod(shape[weight.inputs :]), math.prod(shape[: weight.inputs])
    if base == "position_embedding":
        return shape[0] + layout.position_offset, shape[1]
    return shape if base == "embedding" else (math.prod(shape),)


def place(
    weight: np.ndarray, piece: Piece, stored: np.ndarray, layout: Layout, config: DecoderConfig
) -> None:
    """Copies a piece from its tensor, `stored`, into one layer's `weight`."""
    values = stored.T if layout.is_transposed(piece.part, piece.inputs) else stored
    values = values[piece.rows]
    if layout.interleaved and piece.part in ("q", "k"):
        dims = max(rope.turning(config.head_dim) for rope in config.layer_ropes if rope)
        values = rotate_half_rows(values, config.head_dim, dims)
    if piece.part == "position_embedding":
        values = values[layout.position_offset :]
    target = weight[piece.index]
    if piece.inputs:
        _write_transposed(target, values, piece.inputs)
    else:
        target[...] = values.reshape(target.shape)
    if layout.norm_offset and piece.part.endswith("norm") and piece.tensor.endswith(".weight"):
        target += target.dtype.type(layout.norm_offset)


def _write_transposed(target: np.ndarray, values: np.ndarray, inputs: int) -> None:
    """`values [O, I]` into `target`, whose first `inputs` axes are I and whose others are O.

    A few rows at a time, so that what is read with large strides stays in cache, and converted
    before they are transposed: three times as fast as in one piece, and twice again where the dtype
    changes.
    """
    read, written = target.shape[:inputs], target.shape[inputs:]
    width = written[-1]
    for number, index in enumerate(np.ndindex(written[:-1])):
        for begin in range(0, width, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, width)
            rows = values[number * width + begin : number * width + end].astype(target.dtype)
            target[(..., *index, slice(begin, end))] = rows.T.reshape(*read, end - begin)


def rotate_half_rows(values: np.ndarray, head_dim: int, dims: int) -> np.ndarray:
    """Reorder the rows of a query or key projection `[H*D, ...]` from llama.cpp's order.

    llama.cpp rotates the neighbours (2i, 2i + 1) of the first R = `dims` dimensions of a head, and
    its converter permutes the rows so that this equals rotating (i, i + R/2). This function undoes
    the permutation.
    """
    heads = values.reshape(-1, head_dim, *values.shape[1:])
    halves = heads.copy()
    halves[:, : dims // 2], halves[:, dims // 2 : dims] = heads[:, :dims:2], heads[:, 1:dims:2]
    return halves.reshape(values.shape)
