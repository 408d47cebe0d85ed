"""The engine's side of the device: what it holds, and the calls that update it.

Calls are dispatched without waiting and run in the order of their dispatch; `fetch` waits for one.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from jax_chunkattn.device.backend import Backend
from jax_chunkattn.device.decode_loop import Chosen, decode_steps
from jax_chunkattn.device.model_interface import CacheSpec, DecoderModel
from jax_chunkattn.device.pool import CacheConfig, allocate_pool
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import PROGRAMS, Invocation, SplitModel
from jax_chunkattn.device.request_table import (
    DeviceState,
    RequestTable,
    RowState,
    copy_chunks,
    place_counts,
    place_rows,
)
from jax_chunkattn.engine.requests import EngineClosed, Request, TokenLogprobs, Work
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.planning.planner import PlanShape, plan_decode
from jax_chunkattn.planning.prefill import (
    CALL_TOKENS,
    PrefillBatch,
    PrefillShape,
    Segment,
    max_segments,
    pack_segments,
)
from jax_chunkattn.sampling import NO_CHOICE, NO_TOKEN, RowSampling
from pallas_kernels import DecodePlan

ROWS_PER_PLACEMENT = 8
COPIES_PER_CALL = 8


@dataclass(eq=False)
class Call:
    """A call on its way to the device.

    Attributes:
      requests, rows: whose tokens it chooses, and in which of its rows.
      chosen: tokens and their probabilities, [*K, B].
      decoded: a decode call, which writes a position for each token it chooses; else prefill, which
        chooses the first tokens.
      most_tokens: that each request can get from it.
      round: of the engine's, in which it was dispatched.
      dispatched: when, in seconds; `compiled` until then.
    """

    requests: list[Request]
    rows: list[int]
    chosen: Chosen
    decoded: bool
    most_tokens: list[int] = field(default_factory=list)
    round: int = 0
    dispatched: float = 0.0
    compiled: float = 0.0


@dataclass(frozen=True)
class Results:
    """What a call chose, on the host."""

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
        values = self.chosen.logprobs
        number = min(number, int(np.count_nonzero(values.top_tokens[0, row] != NO_TOKEN)))
        return tuple(
            TokenLogprobs(
                float(values.chosen[step, row]),
                tuple(
                    zip(
                        values.top_tokens[step, row, :number].tolist(),
                        values.top_values[step, row, :number].tolist(),
                        strict=True,
                    )
                ),
            )
            for step in range(count)
        )


class Device:
    """Pool and request table on the device.

    Attributes:
      blocked_seconds: spent waiting for results.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: CacheConfig,
        backend: Backend,
        stats: EngineStats,
        *,
        num_slots: int,
        stop_tokens: Sequence[int],
    ):
        self.blocked_seconds = 0.0
        self._model = model
        self._cache = cache
        self._backend = backend
        self._stats = stats
        self._num_slots = num_slots
        self._stop_tokens = tuple(stop_tokens)
        self._split = SplitModel.of(model)
        self._num_chunks = cache.chunks_for(model.cache_spec)
        self._programs: dict[Hashable, Compiled] = {}  # kept here, they live as long as the engine
        self._state: DeviceState | None = None
        self._prefill_shapes: dict[int, PrefillShape] = {}
        if backend.planner.gpu is None:  # room costs nothing on a CPU
            self._fix_prefill_shapes()
        self._last_ready = 0.0
        sizes = (model.cache_spec, cache, num_slots, model.vocab_size)
        empty = Invocation(_empty_state, None, (), {"sizes": sizes})
        # Compiled, since Ctrl-C in an operation that JAX runs by itself may leave JAX without the
        # trace it works in, for good; and so that it lies where it lay, whoever resets.
        self._empty, _ = PROGRAMS.compiled(empty)
        self.reset()

    def reset(self) -> None:
        """An empty pool and table, in the place of whatever an error has left."""
        old, self._state = self._state, None
        if old is not None:
            _settle(old)
            del old
        self._state = self._allocate()

    def _allocate(self) -> DeviceState:
        return self._empty([])

    def close(self) -> None:
        """Gives up pool, table and programs."""
        self._state = None
        self._programs.clear()

    def copy_chunks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies chunks, given as (source, destination); all are read before any is written."""
        for begin in range(0, len(copies), COPIES_PER_CALL):
            self._update(self._copying(copies[begin : begin + COPIES_PER_CALL]))

    def place(self, requests: Sequence[Request]) -> None:
        """Puts requests into their slots: where they stand, and how their tokens are chosen."""
        for begin in range(0, len(requests), ROWS_PER_PLACEMENT):
            self._update(self._placing(requests[begin : begin + ROWS_PER_PLACEMENT]))
        for request in requests:
            if request.params.has_penalties:
                tokens = request.prompt, request.tokens
                self._update(self._counting(request.placed_slot, *tokens))

    def prefill(self, work: Sequence[tuple[Work, Segment]], num_tokens: int) -> Call:
        """Computes segments, and the first tokens of the requests whose prompts they complete."""
        batch = self._pack([segment for _, segment in work], num_tokens)
        rows = [
            row
            for row, (owner, segment) in enumerate(work)
            if owner.samples_next and segment.end == len(owner.history)
        ]
        requests = [owner for owner, _ in (work[row] for row in rows) if isinstance(owner, Request)]
        slots = self._slots([], max_segments(num_tokens))
        slots[rows] = [request.placed_slot for request in requests]
        chosen = self._update(self._prefilling(slots, batch))
        return self._call(requests, rows, chosen, decoded=False)

    def decode(self, requests: list[Request], plan: DecodePlan, num_steps: int) -> Call:
        """K steps for these requests, which stand in the plan's order."""
        chosen = self._update(self._decoding(requests, plan, num_steps))
        self._stats.calls += 1
        return self._call(requests, list(range(len(requests))), chosen, decoded=True)

    def warm_up(
        self,
        decode_shapes: Sequence[PlanShape],
        num_steps: int,
        prefill_tokens: int,
        *,
        threads: int,
    ) -> int:
        """Compiles all programs, for plans of these shapes, and runs none; returns how many.

        From now on prefill calls of a size, `prefill_tokens` at most, have one shape. What shares
        more than that has room for is computed without sharing.
        """
        self._fix_prefill_shapes()
        sizes = [size for size in CALL_TOKENS if size <= prefill_tokens]
        began = time.perf_counter()
        calls = self._all_calls(decode_shapes, num_steps, sizes)
        programs, compiled = PROGRAMS.compile_all(calls, threads)
        self._programs.update(programs)
        self._stats.compilations += compiled
        self._stats.compile_seconds += time.perf_counter() - began
        return compiled

    @property
    def most_columns(self) -> int:
        """Most chunks of a sequence."""
        return min(-(-self._model.max_positions // self._cache.chunk_size), self._num_chunks)

    def fetch(self, call: Call) -> Results:
        """Waits for a call's results."""
        began = time.perf_counter()
        wants_logprobs = any(request.params.logprobs is not None for request in call.requests)
        tokens = np.asarray(call.chosen.tokens)
        ready = time.perf_counter()
        self.blocked_seconds += ready - began
        # While the host compiled, nobody looked whether the device was done.
        compiled = self._stats.compile_seconds - call.compiled
        busy = max(0.0, ready - max(call.dispatched, self._last_ready) - compiled)
        self._last_ready = ready
        if call.decoded:
            self._stats.decode_seconds += busy
        else:
            self._stats.prefill_seconds += busy
        logprobs: Any = call.chosen.logprobs
        if wants_logprobs:
            logprobs = jax.tree.map(np.asarray, logprobs)
        if not call.decoded:
            tokens = tokens[None]
            if wants_logprobs:  # else they are the device's, where this would be three programs
                logprobs = jax.tree.map(lambda values: values[None], logprobs)
        return Results(Chosen(tokens, logprobs))

    def _update(self, invocation: Invocation) -> Any:
        """Dispatches a call that takes the state and returns a new one, and maybe more."""
        program = self._program(invocation)
        self._state = None  # donated: if the call fails it is gone
        try:
            updated = program(invocation.leaves, *invocation.args)
        except Exception as error:
            self._require_weights(error)
            raise
        if isinstance(updated, DeviceState):
            self._state = updated
            return None
        self._state, chosen = updated
        chosen.tokens.copy_to_host_async()
        return chosen

    def _program(self, invocation: Invocation) -> Compiled:
        key = invocation.key()
        program = self._programs.get(key)
        if program is None:
            program, seconds = PROGRAMS.compiled(invocation)
            self._programs[key] = program
            if seconds:
                self._stats.compilations += 1
                self._stats.compile_seconds += seconds
        return program

    def _require_weights(self, error: Exception) -> None:
        """Raises EngineClosed, caused by `error`, when the model's arrays are gone."""
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in self._split.leaves):
            raise EngineClosed(
                "the engine closed itself: arrays of the model it serves have been deleted, or "
                "donated to another computation. An engine keeps the arrays that the model had "
                "when the engine was made: give a computation that donates them a copy, and make "
                "a new engine for new weights"
            ) from error

    def _call(
        self, requests: list[Request], rows: list[int], chosen: Chosen, decoded: bool
    ) -> Call:
        now = time.perf_counter()
        compiled = self._stats.compile_seconds
        return Call(requests, rows, chosen, decoded, dispatched=now, compiled=compiled)

    def _fix_prefill_shapes(self) -> None:
        """From now on prefill calls of one size have one shape."""
        for size in CALL_TOKENS:
            shape = PrefillShape.largest(size, self.most_columns, self._backend.planner)
            self._prefill_shapes[size] = shape

    def _all_calls(
        self, decode_shapes: Sequence[PlanShape], num_steps: int, prefill_sizes: Sequence[int]
    ) -> Iterator[Invocation]:
        """A call of each kind and shape, with nothing to do; those that take longest to compile
        come first."""
        sizes = {"chunk_size": self._cache.chunk_size, "num_chunks": self._num_chunks}
        for shape in reversed(decode_shapes):
            plan, _ = plan_decode([], [], **sizes, options=self._backend.planner, at_least=shape)
            yield self._decoding([], plan, num_steps)
        for num_tokens in prefill_sizes:
            batch = self._pack([Segment([0], [0], 0, 1, 0)], num_tokens)
            yield self._prefilling(self._slots([], max_segments(num_tokens)), batch)
        yield self._placing([])
        yield self._counting(0, (), [])
        yield self._copying([])

    # What a call is made with. A slot of S, and a chunk of N, stands for nothing.

    def _decoding(self, requests: list[Request], plan: DecodePlan, num_steps: int) -> Invocation:
        slots = self._slots(requests, plan.private_chunks.shape[0])
        static = {"num_steps": num_steps, "implementation": self._backend.decode}
        return Invocation(decode_steps, self._split, (self._state, slots, plan), static)

    def _prefilling(self, slots: np.ndarray, batch: PrefillBatch) -> Invocation:
        static = {"implementation": self._backend.prefill}
        return Invocation(prefill_step, self._split, (self._state, slots, batch), static)

    def _placing(self, requests: Sequence[Request]) -> Invocation:
        rows = np.zeros((3, ROWS_PER_PLACEMENT), np.int32)
        for row, request in enumerate(requests):
            remaining = request.params.max_tokens - len(request.tokens)
            rows[:, row] = (request.tokens or [0])[-1], len(request.history), remaining
        params = [request.params for request in requests]
        sampling = RowSampling.stack(params, ROWS_PER_PLACEMENT, self._stop_tokens)
        slots = self._slots(requests, ROWS_PER_PLACEMENT)
        return Invocation(place_rows, None, (self._state, slots, RowState(*rows), sampling))

    def _counting(self, slot: int, prompt: Sequence[int], tokens: Sequence[int]) -> Invocation:
        vocabulary = self._model.vocab_size
        in_prompt = np.zeros(vocabulary, np.bool_)
        in_prompt[list(prompt)] = True
        generated = np.bincount(tokens, minlength=vocabulary).astype(np.int32)
        args = (self._state, np.asarray(slot, np.int32), in_prompt, generated)
        return Invocation(place_counts, None, args)

    def _copying(self, copies: Sequence[tuple[int, int]]) -> Invocation:
        ids = np.full((2, COPIES_PER_CALL), self._num_chunks, np.int32)
        ids[0] = 0
        ids[:, : len(copies)] = np.array(copies, np.int32).reshape(-1, 2).T
        return Invocation(copy_chunks, None, (self._state, ids[0], ids[1]))

    def _pack(self, segments: list[Segment], num_tokens: int) -> PrefillBatch:
        shape = self._prefill_shapes.get(num_tokens)
        pack = partial(
            pack_segments,
            segments,
            num_tokens=num_tokens,
            chunk_size=self._cache.chunk_size,
            num_chunks=self._num_chunks,
            at_least=shape or PrefillShape(),
        )
        batch = pack(options=self._backend.planner)
        if shape is not None and PrefillShape.of(batch) != shape:
            batch = pack(options=replace(self._backend.planner, sharing=False))
        return batch

    def _slots(self, requests: Sequence[Request], rows: int) -> np.ndarray:
        slots = np.full(rows, self._num_slots, np.int32)
        slots[: len(requests)] = [request.placed_slot for request in requests]
        return slots


def _empty_state(*, sizes: tuple[CacheSpec, CacheConfig, int, int]) -> DeviceState:
    spec, cache, num_slots, vocab_size = sizes
    return DeviceState(allocate_pool(spec, cache), RequestTable.empty(num_slots, vocab_size))


def _settle(state: DeviceState) -> None:
    """Waits until calls that use this state are over, so that its memory can be had again."""
    with suppress(Exception):  # what failed is known already: that is why the state is given up
        jax.block_until_ready(state)
