"""Where an optimisation stands, in a file that another one of the same kind goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Arrays = TypeVar("Arrays")
"""Any tree of arrays."""


def save_state(path: Path, state: object) -> None:
    """Its arrays, in their order."""
    with path.open("wb") as file:
        np.savez(file, *map(np.asarray, jax.tree.leaves(state)))


def saved_state(path: Path, like: Arrays, *, what: str, error: type[ValueError]) -> Arrays:
    """What was saved of a state of these shapes.

    Raises:
      error: when the file cannot be read, or is not of `what`.
    """
    leaves, structure = jax.tree.flatten(like)
    try:
        with np.load(path) as arrays:
            found = [arrays[name] for name in arrays.files]
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem})") from problem
    if [(one.shape, one.dtype) for one in found] != [(one.shape, one.dtype) for one in leaves]:
        raise error(f"{path} is not of {what}")
    return jax.tree.unflatten(structure, map(jnp.asarray, found))
