"""What the rule must hold for: a row for each choice of the seams, and for combinations of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_chunkattn import Engine
from jax_chunkattn.planning.planner import PlannerOptions
from models.decoder import Decoder
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.codecs import ChunkCodec, ChunkContext, Constants
from pallas_kernels.selection import ChunkSelector
from tests.jax_chunkattn.engine.behind import chained
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import (
    laid_over,
    layered_model,
    mesh_of,
    patterned_model,
    toy_model,
    windowed_model,
)


@dataclass(frozen=True, eq=False)
class Feature:
    """One choice.

    Attributes:
      name: of the row.
      options: of the engine that makes it.
      model: gives the one that is run.
      devices: that the engine runs on, along `tp`; None is one, without a mesh.
      learned: whether all requests come behind a learned prefix, which comes behind another.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], Decoder] = toy_model
    devices: int | None = None
    learned: bool = False

    def engine(self, **options: Any) -> Engine:
        """An engine with this feature, and with what a history asks for. With tiers heads with
        windows have as many chunks as others."""
        laid: dict[str, Any] = {"model": self.model()}
        if {"host_memory", "disk"} & options.keys():
            laid["window_chunks"] = None
        if self.devices is not None:
            model = laid_over(self.model(), self.devices)
            laid |= {"model": model, "mesh": mesh_of(self.devices)}
        if self.learned and "num_chunks" in options:
            options["num_chunks"] += 2
        engine = make_engine(**{**self.options, **laid, **options})
        if self.learned:
            chained(engine, own=1)
            for name in ("submit", "submit_samples"):
                setattr(engine, name, partial(getattr(engine, name), prefix="own"))
        return engine

    @property
    def tolerance(self) -> float:
        """Of log-probabilities: what float32 rounds, or nothing."""
        return 0 if "deterministic" in self.options else 1e-5

    @property
    def plain(self) -> bool:
        """Whether nothing is chosen but a prefix."""
        return not self.options and self.devices is None

    @property
    def exact_numbers(self) -> bool:
        """Whether chunks are read as they were written."""
        return "codec" not in self.options

    @property
    def exact(self) -> bool:
        """Whether a part of a chunk may be copied."""
        return not {"clusters", "codec", "selector"} & self.options.keys()


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
SELECTOR = ChunkSelector(0.4, recent=0, refresh=4, whole=3)
"""`PROMPT` and its answer fill 7 chunks: at their end a query chooses one of five to read."""
CHOOSING = {"selector": SELECTOR}
CLUSTERS = (2, 3)
"""Of four heads that read two KV heads: in either layer some read keys of another's KV head."""
GIVEN_UP = {"window_chunks": 56}
"""For a call, and for the windows of three sequences."""
DETERMINISTIC = {"deterministic": True, "planner": PlannerOptions.for_native(in_order=True)}
FEATURES = (
    Feature("identity"),
    Feature("marked chunks", {"codec": MARKED}),
    Feature("windows", GIVEN_UP, windowed_model),
    Feature("windows that give up nothing", {"window_chunks": 200}, windowed_model),
    Feature("windows, marked chunks", {"codec": MARKED}, windowed_model),
    Feature("head pattern", GIVEN_UP, patterned_model),
    Feature("head pattern, marked chunks", {"codec": MARKED}, patterned_model),
    Feature("choices", CHOOSING),
    Feature("choices by bounds", {"selector": replace(SELECTOR, policy="bounds")}),
    Feature("choices by descent", {"selector": replace(SELECTOR, policy="hip")}),
    Feature("choices, marked chunks", {"codec": MARKED, **CHOOSING}),
    Feature("choices, windows", CHOOSING, windowed_model),
    Feature("choices, windows, marked chunks", {"codec": MARKED, **CHOOSING}, windowed_model),
    Feature("clusters", {"clusters": HeadClusters(CLUSTERS)}),
    Feature("clusters, marked chunks", {"clusters": HeadClusters(CLUSTERS), "codec": MARKED}),
    Feature("clusters, windows", {"clusters": HeadClusters(CLUSTERS)}, layered_model),
    Feature("one cluster", {"clusters": HeadClusters((1, 1))}),
    Feature("deterministic", DETERMINISTIC),
    Feature("deterministic, windows", {**DETERMINISTIC, **GIVEN_UP}, windowed_model),
    Feature("deterministic, windows, int4", {**DETERMINISTIC, "codec": "int4"}, windowed_model),
    Feature("tiers", {"host_memory": "60KB", "load": "always"}),
    Feature("learned prefix", learned=True),
    Feature("learned prefix, tiers", {"host_memory": "60KB", "load": "always"}, learned=True),
    Feature("learned prefix, marked chunks", {"codec": MARKED}, learned=True),
    Feature("learned prefix, windows", {"codec": MARKED}, windowed_model, learned=True),
    Feature("learned prefix, choices", CHOOSING, learned=True),
    Feature("learned prefix, choices, marked chunks", {"codec": MARKED, **CHOOSING}, learned=True),
    Feature("learned prefix, deterministic", DETERMINISTIC, learned=True),
    Feature("mesh", devices=2),
    Feature("mesh with copies of heads", devices=4),
    Feature("mesh, marked chunks", {"codec": MARKED}, devices=2),
    Feature("mesh, learned prefix", devices=2, learned=True),
    Feature("mesh, windows", GIVEN_UP, windowed_model, devices=2),
    Feature("mesh, head pattern, marked chunks", {"codec": MARKED}, patterned_model, devices=2),
)
