"""What a codec may know beside the numbers of a chunk: where it stands, and what was calibrated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32

Constants = dict[str, Float32[Array, "... constants"]]
"""What holds for all chunks of a head, by name. Before their last axis they have those of the
chunks, each of its size or 1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkContext:
    """What is known of chunks beside their numbers.

    Attributes:
      begin: positions of their first tokens.
      constants: of their heads.
    """

    begin: Int32[Array, "*chunks"]
    constants: Constants


@dataclass(frozen=True)
class HeadConstants:
    """Constants of all layers and KV heads of a model, for keys and for values. Two with the same
    digest are equal.

    Attributes:
      digest: of all of them.
      keys, values: by name, each `[L, Hkv, n]` float32.
    """

    digest: str
    keys: Mapping[str, np.ndarray] = field(compare=False, repr=False)
    values: Mapping[str, np.ndarray] = field(compare=False, repr=False)

    @classmethod
    def of(cls, keys: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> HeadConstants:
        """With their digest."""
        hashed = hashlib.sha256()
        for of_part in (keys, values):
            for name in sorted(of_part):
                array = np.ascontiguousarray(of_part[name], np.float32)
                hashed.update(f"{name} {array.shape} ".encode())
                hashed.update(array.tobytes())
        return cls(hashed.hexdigest(), keys, values)

    @property
    def heads(self) -> tuple[int, int] | None:
        """The layers and KV heads that they are of; None where there are none."""
        for array in (*self.keys.values(), *self.values.values()):
            return array.shape[0], array.shape[1]
        return None


NO_CONSTANTS = HeadConstants("", {}, {})


def spread(constants: Constants, axes: tuple[int, ...]) -> Constants:
    """With these axes before the last one, as the chunks have them that they are used with."""
    return {name: array.reshape(*axes, array.shape[-1]) for name, array in constants.items()}
