"""Many arrays of the host as one: a call on several devices then sends one to each of them.

Sending one by one costs more than the call: on a CPU, to dispatch one with 20 arrays takes 0.05 ms
on one device and 0.9 ms on eight, with one array 0.01 and 0.08 ms (the fastest of 100).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int32


@dataclass(frozen=True)
class HostArrays:
    """What a tree of arrays of 32-bit numbers and booleans is: all but the numbers."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]

    @classmethod
    def of(cls, tree: Any) -> HostArrays:
        """Of a tree of arrays of the host."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(
            treedef,
            tuple(leaf.shape for leaf in leaves),
            tuple(np.dtype(leaf.dtype) for leaf in leaves),
        )

    @property
    def size(self) -> int:
        """Numbers of all of them."""
        return sum(map(math.prod, self.shapes))

    def split(self, joined: Int32[Array, " n"]) -> Any:
        """The tree again, on the device, of what `join` has made of it."""
        leaves, begin = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = begin + math.prod(shape)
            numbers = lax.slice_in_dim(joined, begin, end).reshape(shape)
            if dtype == np.bool_:
                leaves.append(numbers != 0)
            else:
                leaves.append(lax.bitcast_convert_type(numbers, dtype))
            begin = end
        return jax.tree.unflatten(self.treedef, leaves)


def join(tree: Any) -> np.ndarray:
    """One array, int32, of the bits of all arrays of a tree; of booleans 0 and 1.

    Raises:
      TypeError: for numbers of another size.
    """
    return np.concatenate([_bits(leaf) for leaf in jax.tree.leaves(tree)], dtype=np.int32)


def _bits(array: Any) -> np.ndarray:
    flat = np.ravel(array)
    if flat.dtype == np.bool_:
        return flat.astype(np.int32)
    if flat.dtype.itemsize != 4:
        raise TypeError(f"arrays for a call have 32-bit numbers or booleans, not {flat.dtype}")
    return flat.view(np.int32)
