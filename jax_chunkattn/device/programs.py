"""Compiled programs, kept by the shapes and shardings they were compiled for.

Compiling ahead of the call, rather than inside it, is what lets an engine say how often it compiled
and how long that took, and report speeds without it. Programs are shared by all engines of a
process whose models have one definition and one set of shapes, on the same devices.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.stages import Compiled

from jax_chunkattn.device import memory_maps
from jax_chunkattn.device.host_arrays import HostArrays, join
from jax_chunkattn.device.weights import named_leaves

MAPS_PER_PROGRAM = 500  # on a CPU; measured: 250 to 450


@dataclass(frozen=True)
class SplitModel:
    """A model taken apart once: arrays for the device, the rest as a static definition.

    Passing an NNX module through a jit boundary costs tens of milliseconds a call; a flat list of
    arrays costs microseconds.

    Attributes:
      names: of the arrays, in their order.
    """

    leaves: list[jax.Array] | list[jax.ShapeDtypeStruct]
    definition: Hashable
    merge: Callable[[list[jax.Array]], Any] = field(compare=False)
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any) -> SplitModel:
        """Takes apart `model`, an `nnx.Module`."""
        from flax import nnx  # planning and attention work without

        graphdef, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(state)

        def merge(leaves: list[jax.Array]) -> Any:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

        return cls(leaves, (graphdef, treedef), merge, tuple(named_leaves(state)))

    @property
    def arrays(self) -> list[jax.Array]:
        """The leaves of a model that is there, not only its shapes."""
        assert all(isinstance(leaf, jax.Array) for leaf in self.leaves), "a model of shapes"
        return self.leaves  # pyright: ignore[reportReturnType]

    @cached_property
    def signature(self) -> Hashable:
        """What decides its programs; looked at once, since a model may have hundreds of arrays."""
        return self.definition, *map(_signature, self.leaves)


def _signature(array: Any) -> Hashable:
    """What a program is compiled for; an array on the host has no sharding."""
    return array.shape, array.dtype, getattr(array, "sharding", None)


@dataclass(frozen=True)
class OnMesh:
    """How what a call is given and gives lies on a mesh of devices.

    Said for all of it: where XLA may choose, results lie otherwise than what they replace, and the
    next call is another program.

    Attributes:
      whole: of what the host gives: every device has it.
      results: a tree of shardings, or the beginning of one.
    """

    whole: NamedSharding
    results: Any


@dataclass(frozen=True)
class Invocation:
    """A call of `function(model, *args, **static)`, or without a model of `function(*args, ...)`.

    The first of `args`, if there is one, is donated, unless `keeps` says that it is kept. Arguments
    may be abstract. With `on_mesh` the others are the host's, and travel as one array.
    """

    function: Callable
    model: SplitModel | None
    args: tuple
    static: Mapping[str, Hashable] = field(default_factory=dict)
    on_mesh: OnMesh | None = None
    keeps: bool = False

    @property
    def leaves(self) -> list[jax.Array] | list[jax.ShapeDtypeStruct]:
        """What the program is called with, before `args`."""
        return self.model.leaves if self.model is not None else []

    @property
    def operands(self) -> tuple:
        """What the program is called with, behind its leaves."""
        if self.on_mesh is None or not self.args:
            return self.args
        return self.args[0], join(self.args[1:])

    def key(self) -> Hashable:
        """What decides the program: two invocations with equal keys run the same."""
        model = self.model.signature if self.model is not None else None
        leaves, treedef = jax.tree.flatten(self.args)
        arrays = tuple(map(_signature, leaves))
        static = tuple(sorted(self.static.items()))
        device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        mesh = self.on_mesh.whole if self.on_mesh is not None else None
        return self.function, model, treedef, arrays, static, device, mesh

    def lower(self) -> jax.stages.Lowered:
        """Traces it, by JAX's 32-bit types whatever jax_enable_x64 says."""

        def run(leaves, *args):
            if self.model is None:
                return self.function(*args, **self.static)
            return self.function(self.model.merge(leaves), *args, **self.static)

        run.__name__ = self.function.__name__
        donated = 1 if self.args and not self.keeps else ()
        with jax.enable_x64(False):
            if self.on_mesh is None:
                return jax.jit(run, donate_argnums=donated).lower(self.leaves, *self.args)
            return self._lower_on(self.on_mesh, run, donated)

    def _lower_on(self, place: OnMesh, run: Callable, donated: int | tuple) -> jax.stages.Lowered:
        given = HostArrays.of(self.args[1:])

        def run_joined(leaves, *args):
            state, *joined = args
            # Each by itself: else XLA may divide them among devices, and exchange what it divided.
            others = lax.with_sharding_constraint(given.split(*joined), place.whole)
            return run(leaves, state, *others)

        run_joined.__name__ = run.__name__
        jitted = jax.jit(
            run_joined if self.args else run, donate_argnums=donated, out_shardings=place.results
        )
        if not self.args:
            return jitted.lower(self.leaves)
        joined = jax.ShapeDtypeStruct((given.size,), np.int32, sharding=place.whole)
        return jitted.lower(self.leaves, self.args[0], joined)


class Programs:
    """Compiles each invocation's program once for all who want it, and says how long it took.

    A program lives as long as somebody keeps what `compiled` has given, an engine say; of the
    others the `most` used last are kept here, for those who come later.

    On a CPU a program takes some 250 to 450 memory maps, and a process that needs more than Linux
    allows (`vm.max_map_count`, 65,530) dies while XLA compiles. Before that, programs that nobody
    keeps are given up, and if that is not enough, compiling is refused.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._alive: WeakValueDictionary[Hashable, Compiled] = WeakValueDictionary()
        self._used_last: OrderedDict[Hashable, Compiled] = OrderedDict()
        self._lock = threading.RLock()  # of these two; nothing is compiled under it

    def compiled(self, invocation: Invocation) -> tuple[Compiled, float]:
        """The program of an invocation, to be called with its `leaves` and `operands`.

        Comes with the seconds spent compiling: 0 when it was there.

        Raises:
          RuntimeError: when the process has no room for another program.
        """
        key = invocation.key()
        program = self._find(key)
        if program is not None:
            return program, 0.0
        began = time.perf_counter()
        self._require_room(1)
        program = invocation.lower().compile()
        self._keep(key, program)
        return program, time.perf_counter() - began

    def compile_all(
        self, invocations: Iterable[Invocation], threads: int
    ) -> tuple[dict[Hashable, Compiled], int]:
        """The programs of all these by their keys, and how many of them were not there.

        They are traced one after another in this thread, whose settings count, while `threads`
        others compile what has been traced. Raises as `compiled`.
        """
        programs: dict[Hashable, Compiled] = {}
        compiling: dict[Hashable, Future] = {}
        with ThreadPoolExecutor(threads) as pool:
            for invocation in invocations:
                key = invocation.key()
                program = self._find(key)
                if program is not None:
                    programs[key] = program
                elif key not in compiling:
                    self._require_room(1 + sum(not one.done() for one in compiling.values()))
                    compiling[key] = pool.submit(invocation.lower().compile)
        for key, compiled in compiling.items():
            programs[key] = compiled.result()
            self._keep(key, programs[key])
        return programs, len(compiling)

    def _find(self, key: Hashable) -> Compiled | None:
        with self._lock:
            program = self._alive.get(key)
            if program is not None:
                self._note_use(key, program)
            return program

    def _keep(self, key: Hashable, program: Compiled) -> None:
        with self._lock:
            self._alive[key] = program
            self._note_use(key, program)

    def _note_use(self, key: Hashable, program: Compiled) -> None:
        self._used_last[key] = program
        self._used_last.move_to_end(key)
        while len(self._used_last) > self._most:
            self._used_last.popitem(last=False)

    def _require_room(self, programs: int) -> None:
        needed = programs * MAPS_PER_PROGRAM
        if memory_maps.room() >= needed:
            return
        with self._lock:
            self._used_last.clear()
        gc.collect()
        room = memory_maps.room()
        if room < needed:
            raise RuntimeError(
                "no room to compile another program: this process may have "
                f"{room:,.0f} more memory maps, a program takes up to {MAPS_PER_PROGRAM}, and "
                f"{len(self._alive)} are in use; close engines that are not needed, or raise "
                "vm.max_map_count"
            )


PROGRAMS = Programs()
