"""The engine's device: what it holds, and the calls that update it.

Calls are dispatched without waiting and run in the order of their dispatch; `fetch` waits for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.chunk_transfers import ChunkLayout
from jax_chunkattn.device.decode_loop import Chosen
from jax_chunkattn.device.fingerprint import is_told
from jax_chunkattn.device.invocations import (
    COPIES_PER_CALL,
    ROWS_PER_PLACEMENT,
    Invocations,
    Placement,
)
from jax_chunkattn.device.programs import PROGRAMS, Invocation
from jax_chunkattn.device.read_counts import ReadCounts
from jax_chunkattn.device.request_table import DeviceState
from jax_chunkattn.device.weights import Replacement
from jax_chunkattn.planning.planner import PlanShape
from jax_chunkattn.planning.prefill import Segment
from jax_chunkattn.sampling import NO_CHOICE, TokenLogprobs
from jax_chunkattn.tree.window_room import WindowRoom
from pallas_kernels import DecodePlan


class WeightsDeleted(RuntimeError):
    """Arrays of the model are gone: no call can be made any more."""


@dataclass
class DeviceCounters:
    """What was done on the device so far. Seconds are wall time.

    Attributes:
      calls: decode calls.
      compilations, compile_seconds: programs compiled, and the time that took.
      prefill_seconds, decode_seconds: the device was busy with either.
      blocked_seconds: the host waited for results.
      reads: what decoding rows have read, where they choose; None before they have.
    """

    calls: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    blocked_seconds: float = 0.0
    reads: ReadCounts | None = None


@dataclass(frozen=True)
class Call:
    """A call on its way to the device.

    Attributes:
      chosen: tokens and their probabilities, [*K, B].
      decoded: a decode call, which writes a position for each token it chooses; else prefill, which
        chooses the first tokens.
      dispatched: when, in seconds, and `compile_seconds` until then.
      over: when it was known to be over, where the device waits for each call.
    """

    chosen: Chosen
    decoded: bool
    dispatched: float
    compile_seconds: float
    over: float | None = None


@dataclass(frozen=True)
class Results:
    """What a call chose, and the scores of tokens that were given, on the host."""

    chosen: Chosen

    def tokens_of(self, row: int) -> tuple[list[int], bool]:
        """Tokens chosen for a row, and whether behind them there was none to choose."""
        column = self.chosen.tokens[:, row].tolist()
        return [token for token in column if token >= 0], NO_CHOICE in column

    def logprobs_of(self, row: int, number: int | None, count: int) -> tuple[TokenLogprobs, ...]:
        """Of the first `count` tokens, with `number` likeliest or all that the vocabulary has;
        nothing when the request did not ask."""
        if number is None:
            return ()
        steps = range(count)
        return tuple(TokenLogprobs.at(self.chosen.logprobs, step, row, number) for step in steps)

    def scores_of(self, places: range, number: int) -> tuple[TokenLogprobs, ...]:
        """Of these scored tokens of a prefill call, with the `number` likeliest."""
        assert self.chosen.scores is not None, "the call has scored tokens"
        values = jax.tree.map(lambda of_all: of_all[None], self.chosen.scores)
        return tuple(TokenLogprobs.at(values, 0, place, number) for place in places)


@dataclass(frozen=True)
class ResizedPool:
    """What makes a pool of some size, and the calls that use it."""

    invocations: Invocations
    empty: Compiled


def _allocating(invocations: Invocations) -> Compiled:
    """Compiled, since Ctrl-C in an operation that JAX runs by itself may leave JAX without the
    trace it works in, for good; and so that it lies where it lay, whoever resets."""
    program, _ = PROGRAMS.compiled(invocations.allocating())
    return program


class Device:
    """Pool and request table on the device.

    Attributes:
      counters: what was done so far.
      before_writes: called before each call that may write into the pool; it may read from it.
    """

    def __init__(self, invocations: Invocations):
        self.counters = DeviceCounters()
        self.before_writes: Callable[[], None] | None = None
        self._invocations = invocations
        self._programs: dict[Hashable, Compiled] = {}  # kept here, they live as long as the engine
        self._state: DeviceState | None = None
        self._last_ready = self._dispatched = 0.0
        self._over: float | None = None
        self._waits = invocations.mesh is not None and invocations.mesh.waits
        self._empty = _allocating(invocations)
        self.reset()

    def resize(self, pool: ResizedPool) -> None:
        """Another pool than there was, and empty; `reset` makes it if this is broken off."""
        self._invocations, self._empty = pool.invocations, pool.empty
        self._programs.clear()
        self.reset()

    def resized(self, cache: CacheConfig, window_room: WindowRoom | None) -> ResizedPool:
        """What makes a pool of another size; nothing has changed yet."""
        invocations = self._invocations.resized(cache, window_room)
        return ResizedPool(invocations, _allocating(invocations))

    @property
    def as_it_is(self) -> ResizedPool:
        """What made the pool there is."""
        return ResizedPool(self._invocations, self._empty)

    def reset(self) -> None:
        """An empty pool and table, in the place of whatever an error has left."""
        old, self._state = self._state, None
        if old is not None:
            _wait_for_last_use(old)
            del old
        self._state = self._allocate()

    def _allocate(self) -> DeviceState:
        return self._empty([])

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The arrays that are served, by name."""
        split = self._invocations.split
        return dict(zip(split.names, split.arrays, strict=True))

    def replace_weights(self, new: Replacement) -> None:
        """New values for all of them."""
        new.carry_out(self._invocations.split.arrays)

    def close(self) -> None:
        """Gives up pool, table and programs."""
        self._state = None
        self._programs.clear()

    def copy_chunks(
        self, copies: Sequence[tuple[int, int]], window_copies: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Copies chunks, given as (source, destination), and those of heads with windows, where
        these have their own; no destination is the source of another."""
        for begin in range(0, max(len(copies), len(window_copies)), COPIES_PER_CALL):
            part = slice(begin, begin + COPIES_PER_CALL)
            some = copies[part], window_copies[part]
            self._update(self._invocations.copying(self._state, *some))

    def copy_tails(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies the exact last chunks of slots, given as (source, destination), a destination once
        at most; all are read before any is written. Where full chunks are encoded only."""
        if copies:
            self._update(self._invocations.copying_tails(self._state, copies))

    def write_chunk(self, chunk: int, position: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Writes given keys and values, float32 [L, Hkv, C, D], into a chunk, as those of tokens
        from a position on."""
        self._update(self._invocations.writing_exact(self._state, chunk, position, keys, values))

    @property
    def chunk_layout(self) -> ChunkLayout:
        """What the pool keeps of a full chunk."""
        return self._invocations.chunk_layout

    @property
    def model_is_told(self) -> bool:
        """Whether `namespace_parts` tells the model from all others."""
        return is_told(self._invocations.split)

    def namespace_parts(self) -> dict[str, Any]:
        """What chunks depend on beside their tokens, by the weights that are served."""
        return self._invocations.namespace_parts()

    def read_chunks(self, chunks: Sequence[int]) -> ChunkArrays:
        """What the pool keeps of so many chunks as one of `TRANSFER_SIZES`, as they are now: arrays
        of the device, on their way to the host."""
        invocation = self._invocations.reading(self._state, chunks)
        read = self._program(invocation)(invocation.leaves, *invocation.operands)
        for array in jax.tree.leaves(read):
            array.copy_to_host_async()
        return read

    def write_chunks(self, chunks: Sequence[int], new: ChunkArrays) -> None:
        """Writes so many chunks as they were read."""
        self._update(self._invocations.writing(self._state, chunks, new))

    def place(self, placements: Sequence[Placement]) -> None:
        """Puts requests into their slots."""
        for begin in range(0, len(placements), ROWS_PER_PLACEMENT):
            some = placements[begin : begin + ROWS_PER_PLACEMENT]
            self._update(self._invocations.placing(self._state, some))
        for one in placements:
            if one.params.has_penalties:
                counting = self._invocations.counting
                self._update(counting(self._state, one.slot, one.prompt, one.tokens))

    def prefill(
        self,
        segments: Sequence[Segment],
        slots: Sequence[int | None],
        num_tokens: int,
        window_ids: np.ndarray | None = None,
    ) -> Call:
        """Computes segments, and the first token for each slot whose prompt its segment completes.

        Row i of the results is segment i's. `window_ids` are the tree's.
        """
        prefilling = self._invocations.prefilling
        chosen = self._update(prefilling(self._state, segments, slots, num_tokens, window_ids))
        return self._call(chosen, decoded=False)

    def decode(self, slots: Sequence[int], plan: DecodePlan, num_steps: int) -> Call:
        """K steps for these slots, which stand in the order of the plan's rows."""
        decoding = self._invocations.decoding
        chosen = self._update(decoding(self._state, slots, plan, num_steps))
        self.counters.calls += 1
        return self._call(chosen, decoded=True)

    def warm_up(
        self,
        decode_shapes: Sequence[PlanShape],
        num_steps: int,
        prefill_tokens: int,
        *,
        threads: int,
        scores: bool = False,
        transfers: bool = False,
    ) -> int:
        """Compiles all programs, for plans of these shapes, and runs none; returns how many. Those
        that score given tokens only for `scores`, those that move chunks for `transfers`.

        From now on prefill calls of a size, `prefill_tokens` at most, have one shape. What shares
        more than that has room for is computed without sharing.
        """
        if self._state is None:  # an error has taken it, and no other could be allocated then
            self.reset()
        assert self._state is not None, "allocated"
        self._invocations.fix_prefill_shapes()
        began = time.perf_counter()
        calls = self._invocations.of_all_shapes(
            self._state,
            decode_shapes,
            num_steps,
            prefill_tokens,
            scores=scores,
            transfers=transfers,
        )
        programs, compiled = PROGRAMS.compile_all(calls, threads)
        self._programs.update(programs)
        self.counters.compilations += compiled
        self.counters.compile_seconds += time.perf_counter() - began
        return compiled

    def fetch(self, call: Call, *, logprobs: bool) -> Results:
        """Waits for a call's results, `logprobs` among them if some row asks for them."""
        began = time.perf_counter()
        tokens = np.asarray(call.chosen.tokens)
        self._note_ready(call, began)
        if call.chosen.counts is not None:  # ready as the tokens are
            self._note_reads(jax.tree.map(np.asarray, call.chosen.counts))
        scores = jax.tree.map(np.asarray, call.chosen.scores)
        reported: Any = call.chosen.logprobs
        if logprobs:
            reported = jax.tree.map(np.asarray, reported)
        if not call.decoded:
            tokens = tokens[None]
            if logprobs:  # else they are the device's, where this would be three programs
                reported = jax.tree.map(lambda values: values[None], reported)
        return Results(Chosen(tokens, reported, scores=scores))

    def _note_ready(self, call: Call, began: float) -> None:
        counters, ready = self.counters, time.perf_counter()
        counters.blocked_seconds += ready - began
        # While the host compiled, nobody looked whether the device was done.
        compiled = counters.compile_seconds - call.compile_seconds
        if call.over is not None:
            ready, compiled = call.over, 0.0
        busy = max(0.0, ready - max(call.dispatched, self._last_ready) - compiled)
        self._last_ready = ready
        if call.decoded:
            counters.decode_seconds += busy
        else:
            counters.prefill_seconds += busy

    def _note_reads(self, more: ReadCounts) -> None:
        before = self.counters.reads
        self.counters.reads = more if before is None else before.plus(more)

    def _update(self, invocation: Invocation) -> Any:
        """Dispatches a call that takes the state and returns a new one, and maybe more."""
        if self.before_writes is not None:
            self.before_writes()
        program = self._program(invocation)
        self._state = None  # donated: if the call fails it is gone
        try:
            updated = program(invocation.leaves, *invocation.operands)
            self._dispatched = time.perf_counter()
            if self._waits:
                jax.block_until_ready(updated)
                self._over = time.perf_counter()
                self.counters.blocked_seconds += self._over - self._dispatched
        except Exception as error:
            self._require_weights(error)
            raise
        if isinstance(updated, DeviceState):
            self._state = updated
            return None
        self._state, chosen = updated
        for array in (chosen.tokens, *jax.tree.leaves((chosen.counts, chosen.scores))):
            array.copy_to_host_async()
        return chosen

    def _program(self, invocation: Invocation) -> Compiled:
        key = invocation.key()
        program = self._programs.get(key)
        if program is None:
            program, seconds = PROGRAMS.compiled(invocation)
            self._programs[key] = program
            if seconds:
                self.counters.compilations += 1
                self.counters.compile_seconds += seconds
        return program

    def _require_weights(self, error: Exception) -> None:
        """Raises WeightsDeleted, caused by `error`, when the model's arrays are gone."""
        leaves = self._invocations.split.leaves
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise WeightsDeleted(
                "arrays of the model it serves have been deleted, or donated to another "
                "computation. An engine keeps the arrays that the model had when the engine was "
                "made, until update_weights gives it copies of others: have a computation donate a "
                "copy, and make a new engine"
            ) from error

    def _call(self, chosen: Chosen, *, decoded: bool) -> Call:
        return Call(chosen, decoded, self._dispatched, self.counters.compile_seconds, self._over)


def _wait_for_last_use(state: DeviceState) -> None:
    """Waits until calls that use this state are over, so that its memory can be had again."""
    with suppress(Exception):  # what failed is known already: that is why the state is given up
        jax.block_until_ready(state)
