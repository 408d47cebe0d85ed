"""What can be compiled: a function with abstract arguments, and how much of them is the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compile_report.target import GpuTarget
from pallas_kernels.plans import (
    ChosenChunks,
    DecodePlan,
    HiddenTokens,
    PartialSlots,
    WorkItems,
)


@dataclass(frozen=True)
class Case:
    """A function to compile.

    Attributes:
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      donated: indices of the arguments that the program may overwrite.
      pool_bytes: keys and values of all layers, on one device; 0 when the function only reads it.
      layer_bytes: one layer's keys, on one device: a new array as large is a copy of the pool.
      chunk_bytes: keys and values of a chunk of one head; 0 where that is not of interest.
    """

    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()
    pool_bytes: int = 0
    layer_bytes: int = 0
    chunk_bytes: int = 0


CaseTable = Mapping[str, Callable[[GpuTarget], Case]]
"""Cases by name, each made when it is compiled."""


def abstract(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    """What stands for an array where only its shape and dtype are looked at."""
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_plan(
    rows: int,
    *,
    items: int = 128,
    item_chunks: int = 1024,
    private_chunks: int = 16,
    windows: int | None = None,
    columns: int | None = None,
) -> DecodePlan:
    """A decode plan's shapes: as for `rows` rows with on average four items each; for so many
    windows, where heads have some; and for rows that have chosen some of so many chunks."""
    by_window = () if windows is None else (windows,)

    def ids(*shape: int) -> jax.Array:
        return jnp.zeros((*by_window, *shape), jnp.int32)

    def plan() -> DecodePlan:
        each, of_rows = ids(items), ids(rows)
        chosen = None
        if columns is not None:
            by_row = jnp.zeros((*by_window, rows, columns), jnp.bool_)
            chosen = ChosenChunks(ids(item_chunks), by_row)
        return DecodePlan(
            WorkItems(each, each, each, each, ids(item_chunks), ids(), chosen),
            ids(rows, private_chunks),
            of_rows,
            PartialSlots(ids(items), ids(rows + 1), ids(4 * rows)),
            None if windows is None else HiddenTokens(ids(), ids(), of_rows, of_rows),
        )

    return jax.eval_shape(plan)
