"""What each call to the device is made with: padded arrays and the function that takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from jax_chunkattn.device.backend import Backend
from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.chunk_transfers import (
    TRANSFER_SIZES,
    ChunkLayout,
    read_chunks,
    write_chunks,
)
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.fingerprint import namespace_parts
from jax_chunkattn.device.mesh import EngineMesh
from jax_chunkattn.device.model_interface import CacheSpec, DecoderModel
from jax_chunkattn.device.pool import empty_pool
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Invocation, OnMesh, SplitModel
from jax_chunkattn.device.request_table import (
    DeviceState,
    RequestTable,
    RowState,
    copy_chunks,
    copy_tails,
    place_counts,
    place_rows,
    write_chunk,
)
from jax_chunkattn.planning.planner import PlanShape, plan_decode
from jax_chunkattn.planning.prefill import (
    CALL_TOKENS,
    PrefillBatch,
    PrefillShape,
    Segment,
    max_segments,
    pack_segments,
)
from jax_chunkattn.sampling import RowSampling, SamplingParams
from jax_chunkattn.tree.window_room import WindowRoom
from pallas_kernels import DecodePlan
from pallas_kernels.implementations import BATCH_INVARIANT

ROWS_PER_PLACEMENT = 8
COPIES_PER_CALL = 8


@dataclass(frozen=True)
class Placement:
    """A request put into a slot: where it stands, and how its tokens are chosen.

    `tokens` are those it has chosen; the last of them is not in the pool yet. `virtual` is how many
    tokens of a learned prefix come before the prompt.
    """

    slot: int
    prompt: Sequence[int]
    tokens: Sequence[int]
    params: SamplingParams
    virtual: int = 0

    @property
    def state(self) -> tuple[int, int, int]:
        """As `RowState` has it: the token to feed next, tokens in the pool, tokens to choose."""
        last = self.tokens[-1] if self.tokens else 0
        length = self.virtual + len(self.prompt) + max(0, len(self.tokens) - 1)
        return last, length, self.params.max_tokens - len(self.tokens)


class Invocations:
    """Makes the calls of one engine, padded so that few programs serve all of them.

    A slot of S, and a chunk of N, stands for nothing.

    Attributes:
      most_columns: most chunks of a sequence.
      mesh: that they run on; None is one device.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: CacheConfig,
        backend: Backend,
        *,
        num_slots: int,
        stop_tokens: Sequence[int],
        window_room: WindowRoom | None = None,
        mesh: EngineMesh | None = None,
    ):
        self.split = SplitModel.of(model)
        self._spec = model.cache_spec
        self._cache = cache
        self._backend = backend
        self._vocab_size = model.vocab_size
        self._num_slots = num_slots
        self._stop_tokens = tuple(stop_tokens)
        self._max_positions = model.max_positions
        self._window_room = window_room
        self.mesh = mesh
        self._size_pool()

    def resized(self, cache: CacheConfig, window_room: WindowRoom | None) -> Invocations:
        """The same for a pool of another size, of which only the size is another."""
        other = copy(self)
        for cached in ("chunk_layout", "_state_places"):
            vars(other).pop(cached, None)
        other._cache, other._window_room = cache, window_room
        other._size_pool()
        return other

    def _size_pool(self) -> None:
        """What depends on how many chunks there are."""
        self._num_chunks = self._cache.chunks_for(self._spec, self._num_slots)
        columns = -(-self._max_positions // self._cache.chunk_size)
        self.most_columns = min(columns, self._num_chunks)
        self._prefill_shapes: dict[int, PrefillShape] = {}
        if self._backend.planner.gpu is None:  # room costs nothing on a CPU
            self.fix_prefill_shapes()

    def fix_prefill_shapes(self) -> None:
        """From now on prefill calls of one size have one shape.

        What shares more than that has room for is computed without sharing.
        """
        for size in CALL_TOKENS:
            shape = PrefillShape.largest(size, self.most_columns, self._backend.planner)
            self._prefill_shapes[size] = shape

    def of_all_shapes(
        self,
        state: DeviceState,
        decode_shapes: Sequence[PlanShape],
        num_steps: int,
        prefill_tokens: int,
        *,
        scores: bool,
        transfers: bool = False,
    ) -> Iterator[Invocation]:
        """A call of each kind and shape, with nothing to do; those that take longest to compile
        come first. Of prefill calls both kinds if there are to be `scores`; `transfers` are of
        chunks that leave the pool and come back."""
        for shape in reversed(decode_shapes):
            for columns in self._columns_of_plans():
                plan, _ = plan_decode(
                    [],
                    [],
                    chunk_size=self._cache.chunk_size,
                    num_chunks=self._num_chunks,
                    options=self._backend.planner,
                    at_least=shape,
                    windows=self._spec.different_windows,
                    columns=columns,
                )
                yield self.decoding(state, [], plan, num_steps)
        ids = None if self._window_room is None else np.zeros(self._num_chunks + 1, np.int32)
        for num_tokens in CALL_TOKENS:
            if num_tokens <= prefill_tokens:
                for targets in [[], [0]] if scores else [[]]:
                    segment = Segment([0], [0], 0, 1, 0, targets=targets)
                    yield self.prefilling(state, [segment], [None], num_tokens, ids)
        yield self.placing(state, [])
        yield self.counting(state, 0, (), [])
        yield self.copying(state, [])
        if self._cache.takes_given_chunks and self._window_room is None:
            shape = self._given_shape
            yield self.writing_exact(state, 0, 0, *np.zeros((2, *shape), np.float32))
        if self._cache.copies_tails:
            for number in {min(COPIES_PER_CALL, self._num_slots), self._num_slots}:
                yield self.copying_tails(state, [(0, 0)] * number)
        for number in TRANSFER_SIZES if transfers else ():
            layout, nothing = self.chunk_layout, np.zeros(self.chunk_layout.chunk_bytes, np.uint8)
            yield self.reading(state, [0] * number)
            yield self.writing(state, [0] * number, layout.unpack([nothing] * number))

    def allocating(self) -> Invocation:
        """An empty pool and table."""
        return self._invocation(_empty_state, (), **self._state_sizes)

    def decoding(
        self, state: DeviceState | None, slots: Sequence[int], plan: DecodePlan, num_steps: int
    ) -> Invocation:
        """K steps for the rows of these slots, which are the plan's."""
        padded = self._pad_slots(slots, plan.num_rows)
        how = {"num_steps": num_steps, "implementation": self._backend.decode}
        return self._invocation(decode_steps, (state, padded, plan), self.split, **how)

    def prefilling(
        self,
        state: DeviceState | None,
        segments: Sequence[Segment],
        slots: Sequence[int | None],
        num_tokens: int,
        window_ids: np.ndarray | None = None,
    ) -> Invocation:
        """Segments, each with the slot whose prompt it completes; `window_ids` as of
        `pack_segments`."""
        nowhere = self._num_slots
        padded = self._pad_slots(
            [nowhere if slot is None else slot for slot in slots], max_segments(num_tokens)
        )
        batch = self._pack(list(segments), num_tokens, window_ids)
        how = {"implementation": self._backend.prefill}
        return self._invocation(prefill_step, (state, padded, batch), self.split, **how)

    def placing(self, state: DeviceState | None, placements: Sequence[Placement]) -> Invocation:
        """At most `ROWS_PER_PLACEMENT` requests put into their slots."""
        rows = np.zeros((3, ROWS_PER_PLACEMENT), np.int32)
        for row, placement in enumerate(placements):
            rows[:, row] = placement.state
        params = [placement.params for placement in placements]
        sampling = RowSampling.stack(params, ROWS_PER_PLACEMENT, self._stop_tokens)
        slots = self._pad_slots([placement.slot for placement in placements], ROWS_PER_PLACEMENT)
        return self._invocation(place_rows, (state, slots, RowState(*rows), sampling))

    def counting(
        self, state: DeviceState | None, slot: int, prompt: Sequence[int], tokens: Sequence[int]
    ) -> Invocation:
        """What a placed request has seen, for its penalties."""
        in_prompt = np.zeros(self._vocab_size, np.bool_)
        in_prompt[list(prompt)] = True
        generated = np.bincount(tokens, minlength=self._vocab_size).astype(np.int32)
        args = (state, np.asarray(slot, np.int32), in_prompt, generated)
        return self._invocation(place_counts, args)

    def copying(
        self,
        state: DeviceState | None,
        copies: Sequence[tuple[int, int]],
        window_copies: Sequence[tuple[int, int]] = (),
    ) -> Invocation:
        """At most `COPIES_PER_CALL` chunks copied, given as (source, destination), and as many of
        heads with windows, where those have their own."""
        ids = _padded_copies(copies, COPIES_PER_CALL, self._num_chunks)
        windowed = None
        if self._window_room is not None:
            padded = _padded_copies(window_copies, COPIES_PER_CALL, self._num_chunks)
            windowed = padded[0], padded[1]
        return self._invocation(copy_chunks, (state, *ids, windowed))

    def writing_exact(
        self, state: DeviceState | None, chunk: int, position: int, keys: Any, values: Any
    ) -> Invocation:
        """A chunk of given keys and values, float32 [L, Hkv, C, D]; its first token's position."""
        ids = np.asarray(chunk, np.int32), np.asarray(position, np.int32)
        return self._invocation(write_chunk, (state, *ids, keys, values))

    def copying_tails(
        self, state: DeviceState | None, copies: Sequence[tuple[int, int]]
    ) -> Invocation:
        """At most a tail for each slot, given as (source, destination), all in one call: a slot may
        be the source of one and the destination of another."""
        few = min(COPIES_PER_CALL, self._num_slots)
        ids = _padded_copies(
            copies, few if len(copies) <= few else self._num_slots, self._num_slots
        )
        return self._invocation(copy_tails, (state, *ids))

    def reading(self, state: DeviceState | None, chunks: Sequence[int]) -> Invocation:
        """What the pool keeps of so many chunks as one of `TRANSFER_SIZES`."""
        return Invocation(read_chunks, None, (state, np.array(chunks, np.int32)), keeps=True)

    def writing(
        self, state: DeviceState | None, chunks: Sequence[int], new: ChunkArrays
    ) -> Invocation:
        """The same written, as it was read."""
        return Invocation(write_chunks, None, (state, np.array(chunks, np.int32), new))

    @cached_property
    def chunk_layout(self) -> ChunkLayout:
        """What the pool keeps of one chunk."""
        state = jax.eval_shape(partial(_empty_state, **self._state_sizes))
        return ChunkLayout.of(state.pool.chunks)

    def namespace_parts(self) -> dict[str, Any]:
        """What chunks of the pool depend on beside their tokens; reads the weights."""
        return namespace_parts(
            self.split,
            self._spec,
            self._cache,
            self.chunk_layout,
            batch_invariant=self._backend.decode == BATCH_INVARIANT,
        )

    def _invocation(
        self, function: Callable, args: tuple, model: SplitModel | None = None, **static: Any
    ) -> Invocation:
        """On one device, or laid over the mesh; with a model it also says what was chosen."""
        if self.mesh is None:
            return Invocation(function, model, args, static)
        results: Any = self._state_places
        if model is not None:
            static["mesh"] = self.mesh
            results = results, self.mesh.whole
        return Invocation(function, model, args, static, OnMesh(self.mesh.whole, results))

    @property
    def _given_shape(self) -> tuple[int, ...]:
        spec = self._spec
        return spec.num_layers, spec.num_kv_heads, self._cache.chunk_size, spec.head_dim

    @cached_property
    def _state_places(self) -> Any:
        assert self.mesh is not None, "asked where there is one"
        return self.mesh.places(jax.eval_shape(partial(_empty_state, **self._state_sizes)))

    @property
    def _state_sizes(self) -> dict[str, Any]:
        sizes = self._spec, self._cache, self._num_slots, self.most_columns, self._window_room
        return {"sizes": sizes, "vocab_size": self._vocab_size}

    def _columns_of_plans(self) -> list[int | None]:
        """Of the rows' tables in decode plans, and None if there are plans without them."""
        beyond, most = self._cache.tables_beyond, self.most_columns
        with_tables = beyond is not None and most > beyond
        return [*([most] if with_tables else []), *([] if beyond == 0 else [None])]

    def _pack(
        self, segments: list[Segment], num_tokens: int, window_ids: np.ndarray | None
    ) -> PrefillBatch:
        shape = self._prefill_shapes.get(num_tokens)
        pack = partial(
            pack_segments,
            segments,
            num_tokens=num_tokens,
            chunk_size=self._cache.chunk_size,
            num_chunks=self._num_chunks,
            at_least=shape or PrefillShape(),
            num_slots=self._num_slots if self._cache.whole_chunks else None,
            windows=self._spec.different_windows,
            window_ids=window_ids,
        )
        batch = pack(options=self._backend.planner)
        if shape is not None and PrefillShape.of(batch) != shape:
            batch = pack(options=replace(self._backend.planner, sharing=False))
        return batch

    def _pad_slots(self, slots: Sequence[int], rows: int) -> np.ndarray:
        padded = np.full(rows, self._num_slots, np.int32)
        padded[: len(slots)] = slots
        return padded


def _padded_copies(copies: Sequence[tuple[int, int]], number: int, nowhere: int) -> np.ndarray:
    """Sources and destinations of so many copies; what is left over is copied nowhere."""
    ids = np.full((2, number), nowhere, np.int32)
    ids[0] = 0
    ids[:, : len(copies)] = np.array(copies, np.int32).reshape(-1, 2).T
    return ids


def _empty_state(
    *, sizes: tuple[CacheSpec, CacheConfig, int, int, WindowRoom | None], vocab_size: int
) -> DeviceState:
    _, _, num_slots, _, _ = sizes
    return DeviceState(empty_pool(*sizes), RequestTable.empty(num_slots, vocab_size))
