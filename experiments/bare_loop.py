"""The compiled decode program called again and again, with plans made beforehand and nothing read
back meanwhile: the most that an engine can reach at these shapes, and decoding alone.

The keys and values of the prompts are random: a step takes as long whatever they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_chunkattn import CacheSpec, ChunkPool, PlanSummary, plan_decode
from jax_chunkattn.device.backend import Backend
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.model_interface import for_serving
from jax_chunkattn.device.programs import PROGRAMS, Invocation, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState
from jax_chunkattn.engine.engine import MIN_SLOTS
from jax_chunkattn.planning.planner import PlanShape, bucket
from models import LoadedModel
from pallas_kernels import DecodePlan
from pallas_kernels.implementations import COMPILED_HERE


def random_pool(
    spec: CacheSpec, num_chunks: int, chunk_size: int, dtype: str, seed: int
) -> ChunkPool:
    """A pool of normal keys and values."""
    shape = (spec.num_layers, spec.num_kv_heads, num_chunks, chunk_size, spec.head_dim)
    keys = jax.random.split(jax.random.key(seed))
    return ChunkPool(*(jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys))


@dataclass(frozen=True)
class LoopRun:
    """Attributes:
    tokens: chosen, [T, B].
    seconds: from the beginning until each of the marks.
    """

    tokens: np.ndarray
    seconds: list[float]


class BareLoop:
    """Decodes the same rows from the same lengths, as often as it is run.

    Attributes:
      plan_summary: of its first call.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pool: ChunkPool,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        *,
        tokens: int,
        steps_per_call: int,
        backend: Backend,
        columns: int,
    ) -> None:
        """Takes over `pool`; `tables` have room for `tokens` more, a multiple of `steps_per_call`.

        Plans are padded for rows of `columns` chunks.
        """
        rows = len(tables)
        shape = PlanShape.largest(rows, columns, backend.planner)
        planned = [
            plan_decode(
                tables,
                [length + begin for length in lengths],
                chunk_size=pool.chunk_size,
                num_chunks=pool.num_chunks,
                options=backend.planner,
                at_least=shape,
                windows=loaded.model.cache_spec.different_windows,
            )
            for begin in range(0, tokens, steps_per_call)
        ]
        self.plan_summary: PlanSummary = planned[0][1]
        self._plans = [plan for plan, _ in planned]
        self._pool = pool
        self._rows = rows
        self._static = {"num_steps": steps_per_call, "implementation": backend.decode}
        compiled = backend.decode in COMPILED_HERE  # products too, as in an engine
        self._model = SplitModel.of(for_serving(loaded.model) if compiled else loaded.model)
        num_slots = bucket(rows, MIN_SLOTS)
        state = RowState(*np.zeros((3, num_slots), np.int32))
        state.lengths[:rows] = lengths
        state.remaining[:rows] = tokens
        self._table = RequestTable.of(state, [], loaded.config.vocab_size)
        self._slots = np.full(shape.rows, num_slots, np.int32)
        self._slots[:rows] = np.arange(rows)

    def warm_up(self) -> None:
        """Compiles, and runs the first call; what it writes is written again by every run."""
        self._decode(self._plans[:1], ())

    def run(self, marks: Sequence[int] = ()) -> LoopRun:
        """All tokens; timed until each number of `marks`, in calls, and without them to the end.

        Programs that are not compiled yet are compiled before.
        """
        return self._decode(self._plans, marks or (len(self._plans),))

    def _decode(self, plans: Sequence[DecodePlan], marks: Sequence[int]) -> LoopRun:
        state = DeviceState(self._pool, jax.tree.map(jnp.array, self._table))
        programs = [
            PROGRAMS.compiled(
                Invocation(decode_steps, self._model, (state, self._slots, plan), self._static)
            )[0]
            for plan in plans  # one and the same, unless plans for a GPU outgrow their shape
        ]
        jax.block_until_ready(state)
        seconds, chosen = [], []
        began = time.perf_counter()
        for call, (program, plan) in enumerate(zip(programs, plans, strict=True), start=1):
            state, emitted = program(self._model.leaves, state, self._slots, plan)
            chosen.append(emitted.tokens)
            if call in marks:
                jax.block_until_ready(state)
                seconds.append(time.perf_counter() - began)
        self._pool = state.pool
        tokens = np.concatenate([np.asarray(each) for each in chosen])
        return LoopRun(tokens[:, : self._rows], seconds)
