"""What the rule must hold for: a row for each choice of the seams, and for combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax_chunkattn import Engine
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


FEATURES = (Feature("identity"),)
