"""What the rule must hold for: a row for each choice of the seams, and for combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_chunkattn import Engine
from pallas_kernels.codecs import ChunkCodec, ChunkContext, Constants
from tests.jax_chunkattn.engine.engines import make_engine


@dataclass(frozen=True, eq=False)
class Feature:
    """One choice.

    Attributes:
      name: of the row.
      options: of the engine that makes it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def engine(self, **options: Any) -> Engine:
        """An engine with this feature, and with what a history asks for."""
        return make_engine(**{**self.options, **options})

    @property
    def exact(self) -> bool:
        """Whether a part of a chunk may be copied."""
        return "codec" not in self.options


@dataclass(frozen=True)
class Marked:
    """A codec whose every number reads as a larger one, as smoothly as rounding wants it: codes of
    few bits would make much of the last bit of a number, which histories differ in."""

    def problem(self, chunk_size: int, head_dim: int) -> None:
        return None

    def arrays(self, chunk_size: int, head_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"numbers": jax.ShapeDtypeStruct((chunk_size, head_dim), jnp.float32)}

    def encode(self, numbers: Array, context: ChunkContext | None = None) -> dict[str, Array]:
        return {"numbers": numbers.astype(jnp.float32) * 1.5}

    def decode(self, stored: dict[str, Array], constants: Constants | None = None) -> Array:
        return stored["numbers"]


MARKED = ChunkCodec("marked", Marked(), Marked())
FEATURES = (Feature("identity"), Feature("marked chunks", {"codec": MARKED}))
