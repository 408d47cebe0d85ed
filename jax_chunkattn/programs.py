"""Compiled programs, kept by the shapes and shardings they were compiled for.

Compiling ahead of the call, rather than inside it, is what lets an engine say how often it compiled
and how long that took, and report speeds without it. Programs are shared by all engines of a
process whose models have one definition and one set of shapes, on the same devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
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

    @cached_property
    def signature(self) -> Hashable:
        """What decides its programs; looked at once, since a model may have hundreds of arrays."""
        return self.definition, *map(_signature, self.leaves)


def _signature(array: Any) -> Hashable:
    """What a program is compiled for; an array on the host has no sharding."""
    return array.shape, array.dtype, getattr(array, "sharding", None)


@dataclass(frozen=True)
class Invocation:
    """A call of `function(model, *args, **static)`, or without a model of `function(*args, ...)`.

    The first of `args` is donated. Arguments may be abstract.
    """

    function: Callable
    model: SplitModel | None
    args: tuple
    static: Mapping[str, Hashable] = field(default_factory=dict)

    @property
    def leaves(self) -> list[jax.Array]:
        """What the program is called with, before `args`."""
        return self.model.leaves if self.model is not None else []

    def key(self) -> Hashable:
        """What decides the program: two invocations with equal keys run the same."""
        model = self.model.signature if self.model is not None else None
        leaves, treedef = jax.tree.flatten(self.args)
        arrays = tuple(map(_signature, leaves))
        return self.function, model, treedef, arrays, tuple(sorted(self.static.items()))

    def lower(self) -> jax.stages.Lowered:
        """Traces it, by JAX's 32-bit types whatever jax_enable_x64 says."""

        def run(leaves, *args):
            if self.model is None:
                return self.function(*args, **self.static)
            return self.function(self.model.merge(leaves), *args, **self.static)

        run.__name__ = self.function.__name__
        with jax.enable_x64(False):
            return jax.jit(run, donate_argnums=1).lower(self.leaves, *self.args)


class Programs:
    """Compiles each invocation's program once, and says how long it took.

    Of more than `most` programs those used last are kept. On a CPU one takes some 440 memory maps,
    and a process that needs more than Linux allows (`vm.max_map_count`: 65,530) dies while XLA
    compiles.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._compiled: dict[Hashable, Any] = {}

    def compiled(
        self, function: Callable, model: SplitModel | None, args: tuple, **static: Hashable
    ) -> tuple[Any, float]:
        """The program of an `Invocation`, to be called with its `leaves` and `args`.

        Returns it and the seconds spent compiling: 0 when the program was there.
        """
        invocation = Invocation(function, model, args, static)
        key = invocation.key()
        program = self._compiled.pop(key, None)
        if program is not None:
            self._compiled[key] = program  # the last used stands last
            return program, 0.0
        start = time.perf_counter()
        program = invocation.lower().compile()
        self._keep({key: program})
        return program, time.perf_counter() - start

    def compile_all(self, invocations: Iterable[Invocation], threads: int) -> int:
        """Compiles the programs of these that are not there yet; returns how many.

        They are traced one after another in this thread, whose settings count, while `threads`
        others compile what has been traced.
        """
        programs: dict[Hashable, Any] = {}
        compiling: dict[Hashable, Future] = {}
        with ThreadPoolExecutor(threads) as pool:
            for invocation in invocations:
                key = invocation.key()
                if key in self._compiled:
                    programs[key] = self._compiled.pop(key)
                elif key not in compiling:
                    compiling[key] = pool.submit(invocation.lower().compile)
        self._keep(programs | {key: program.result() for key, program in compiling.items()})
        return len(compiling)

    def _keep(self, programs: Mapping[Hashable, Any]) -> None:
        """Puts programs last, and drops those before them that are too many."""
        self._compiled.update(programs)
        too_many = len(self._compiled) - max(self._most, len(programs))
        for key in list(self._compiled)[: max(0, too_many)]:
            self._compiled.pop(key, None)


PROGRAMS = Programs()
