"""Compiled programs, kept by the shapes they were compiled for.

Compiling ahead of the call, rather than inside it, is what lets an engine say how often it compiled
and how long that took, and report speeds without it. Programs are shared by all engines of a
process whose models have one definition and one set of shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True)
class SplitModel:
    """A model taken apart once: arrays for the device, the rest as a static definition.

    Passing an NNX module through a jit boundary costs tens of milliseconds a call; a flat list of
    arrays costs microseconds.
    """

    leaves: list[jax.Array]
    definition: Hashable
    merge: Callable[[list[jax.Array]], Any] = field(compare=False)

    @classmethod
    def of(cls, model: Any) -> SplitModel:
        """Takes apart `model`, an `nnx.Module`."""
        from flax import nnx  # planning and attention work without

        graphdef, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(state)

        def merge(leaves: list[jax.Array]) -> Any:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

        return cls(leaves, (graphdef, treedef), merge)


class Programs:
    """Compiles a function for each new set of argument shapes, and counts."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Any] = {}

    def compiled(
        self, function: Callable, model: SplitModel | None, args: tuple, **static: Hashable
    ) -> tuple[Any, float]:
        """The program of `function(model, *args, **static)`, its first argument `args[0]` donated.

        Without a model it is `function(*args, **static)`. Arguments may be abstract.

        Returns it, to be called with `(model.leaves, *args)`, or `([], *args)` without a model, and
        the seconds spent compiling: 0 when the program was there.
        """
        model_leaves = model.leaves if model is not None else []
        definition = model.definition if model is not None else None
        leaves, treedef = jax.tree.flatten((model_leaves, args))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (function, definition, treedef, shapes, tuple(sorted(static.items())))
        program = self._compiled.get(key)
        if program is not None:
            return program, 0.0
        start = time.perf_counter()

        def run(leaves, *args):
            if model is None:
                return function(*args, **static)
            return function(model.merge(leaves), *args, **static)

        run.__name__ = function.__name__
        program = jax.jit(run, donate_argnums=1).lower(model_leaves, *args).compile()
        self._compiled[key] = program
        return program, time.perf_counter() - start


PROGRAMS = Programs()
