"""Tiles of what rows have chosen, by the compiled kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.native import library
from pallas_kernels.plans import ChosenTiles


def tiles_of(
    columns: Int32[Array, "B R"],
    counts: Int32[Array, " B"],
    tables: Int32[Array, "B P"],
    most: int,
    size: int,
    num_chunks: int,
) -> ChosenTiles:
    """Each chunk that rows have in the first `counts` of these columns of their tables, with those
    rows: at most `most` tiles of `size` rows. `count` is how many there would be."""
    shapes = (most,), (most, size), ()
    outputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    operands = columns, counts, tables
    return ChosenTiles(*library.call(library.TILES, operands, outputs, no_chunk=num_chunks))
