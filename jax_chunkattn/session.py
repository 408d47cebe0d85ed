"""A decode session: requests behind shared prefixes, from token ids to token ids.

It joins the parts: the tree says what is cached, the prefill computes the rest, the planner turns
the tree into a plan, the decode loop runs it. Batches are decoded together; requests may be added
and released between calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from jax_chunkattn.admission import InvalidRequest, check_request, chunks_to_finish
from jax_chunkattn.allocator import PoolExhausted
from jax_chunkattn.backend import choose_backend
from jax_chunkattn.decode_loop import NOTHING, DecodeState, decode_steps
from jax_chunkattn.model_interface import DecoderModel
from jax_chunkattn.planner import PlannerOptions, PlanShape, plan_decode
from jax_chunkattn.pool import CacheConfig, allocate_pool
from jax_chunkattn.prefill import Segment, max_segments, next_call, pack_segments, prefill_step
from jax_chunkattn.prefix_tree import PrefixTree
from jax_chunkattn.programs import PROGRAMS, SplitModel
from jax_chunkattn.requests import OnProgress, Progress, Request, SessionStats
from jax_chunkattn.sampling import RowSampling, SamplingParams
from jax_chunkattn.tree_nodes import SequenceHandle
from pallas_kernels import DecodePlan


def _ignore(*_) -> None:
    pass


class DecodeSession:
    """Decodes batches of requests over one chunk pool.

    Args:
      model: any decoder with the interface of `jax_chunkattn.model_interface`.
      cache: size and dtype of the pool.
      sharing: False gives every request chunks of its own, as a server without a prefix cache.
      implementation: of attention when decoding; None picks the best that runs here. Prefill
        takes the same, or the best that it has where it lacks it. `backend` says what was chosen.
      steps_per_call: tokens decoded per row in one call to the device, K.
      stop_tokens: ids that end a request.
      planner: how attention work is cut; None fits it to the implementation and the device.

    Raises:
      ValueError: for a bad option, or an implementation that cannot run here.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: CacheConfig,
        *,
        sharing: bool = True,
        implementation: str | None = None,
        steps_per_call: int = 8,
        stop_tokens: Sequence[int] = (),
        planner: PlannerOptions | None = None,
    ):
        if steps_per_call < 1:
            raise ValueError(f"steps_per_call must be at least 1, got {steps_per_call}")
        self.model = model
        self.cache = cache
        self.backend = choose_backend(
            model.cache_spec, cache, implementation=implementation, planner=planner
        )
        self.stats = SessionStats()
        self.tree = PrefixTree(cache.num_chunks, cache.chunk_size)
        self._split = SplitModel.of(model)
        self._pool = allocate_pool(model.cache_spec, cache)
        self._sharing = sharing
        self._steps_per_call = steps_per_call
        self._stop_tokens = frozenset(stop_tokens)
        self._stop_array = np.array(sorted(self._stop_tokens) or [NOTHING], np.int32)
        self._salts = count()
        self._requests: dict[SequenceHandle, Request] = {}
        self._plan: DecodePlan | None = None
        self._plan_key = None
        self._plan_shape = PlanShape()

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        on_progress: OnProgress = _ignore,
    ) -> list[Request]:
        """Starts requests: computes what of their prompts is not cached, and their first tokens.

        Prompts that arrive together compute a prefix they have in common once.

        Raises:
          InvalidRequest: for a prompt or sampling parameters this session can never serve.
          PoolExhausted: when the pool cannot hold the new requests, to their ends, beside the
            running ones. In both cases no request has been started.
        """
        each = self._expand(sampling, len(prompts))
        checked = [
            check_request(index, prompt, params, self.model, self.cache)
            for index, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        if not self._requests:
            self._plan_shape = PlanShape()
        added: list[Request] = []
        try:
            for prompt, params in zip(checked, each, strict=True):
                request = Request(prompt, params, self.tree.insert(prompt, self._salt()))
                self._requests[request.sequence] = request
                added.append(request)
            self._require_room()
            self._prefill(added, on_progress)
        except BaseException:
            for request in added:
                self.release(request)
            raise
        return added

    def step(self) -> list[Request]:
        """Decodes up to `steps_per_call` tokens for every running request, in one device call.

        Returns the requests that finished in it; they hold their chunks until `release`.
        """
        running = self._running()
        if not running:
            return []
        for request in running:
            self.tree.reserve(request.sequence, min(request.remaining, self._steps_per_call))
        self._note_memory()
        plan = self._current_plan(running)
        rows = plan.private_chunks.shape[0]
        args = (
            self._pool,
            _decode_state(running, rows),
            plan,
            RowSampling.stack([request.sampling for request in running], rows),
            self._stop_array,
        )
        program = self._program(
            decode_steps,
            args,
            num_steps=self._steps_per_call,
            implementation=self.backend.decode,
        )
        start = time.perf_counter()
        self._pool, _, chosen = program(self._split.leaves, *args)
        chosen = np.asarray(chosen)
        self.stats.decode_seconds += time.perf_counter() - start
        return [
            request for row, request in enumerate(running) if self._record(request, chosen[:, row])
        ]

    def release(self, request: Request) -> None:
        """Ends a request, finished or not; what it computed stays cached while there is room.

        Raises:
          ValueError: when it was released before.
        """
        if self._requests.pop(request.sequence, None) is None:
            raise ValueError("the request was released before")
        self.tree.release(request.sequence)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        on_progress: OnProgress = _ignore,
    ) -> list[Request]:
        """Decodes the prompts together until all are finished, and releases them.

        `on_progress` is called after every call to the device; an exception from it ends the run.
        Raises what `add` raises.
        """
        added = self.add(prompts, sampling, on_progress=on_progress)
        total = sum(request.sampling.max_tokens for request in added)
        try:
            while any(request.finish_reason is None for request in added):
                self.step()
                left = sum(request.remaining for request in added)
                on_progress(Progress("decode", total - left, total))
        finally:
            for request in added:
                self.release(request)
        return added

    def _expand(self, sampling, number: int) -> list[SamplingParams]:
        if isinstance(sampling, SamplingParams):
            return [sampling] * number
        if len(sampling) != number:
            raise InvalidRequest(f"{len(sampling)} sampling parameters for {number} prompts")
        return list(sampling)

    def _salt(self) -> bytes:
        return b"" if self._sharing else b"unshared %d" % next(self._salts)

    def _require_room(self) -> None:
        """Raises PoolExhausted when running requests could not all come to their ends."""
        missing = sum(
            chunks_to_finish(
                len(request.prompt), request.sampling.max_tokens, self.cache.chunk_size
            )
            - len(request.sequence.chunk_ids)
            for request in self._requests.values()
        )
        available = self.tree.free_count + self.tree.cached_count
        if missing > available:
            raise PoolExhausted(
                f"the requests can come to need {missing} more chunks of "
                f"{self.cache.chunk_size} tokens, and {available} of {self.cache.num_chunks} are "
                "not in use"
            )

    def _prefill(self, requests: list[Request], on_progress: OnProgress) -> None:
        work = self._missing_segments(requests)
        total = sum(segment.end - segment.begin for _, segment in work)
        self.stats.prefill_tokens_reused += sum(len(r.prompt) for r in requests) - total
        done = 0
        self._note_memory()
        on_progress(Progress("prefill", done, total))
        while work:
            call, work, num_tokens = next_call(work, total - done)
            call.sort(key=lambda part: part[1].chunk_ids)  # equal prefixes become neighbours
            self._prefill_call(call, num_tokens)
            done += sum(segment.end - segment.begin for _, segment in call)
            on_progress(Progress("prefill", done, total))
        self.stats.prefill_tokens_computed += total

    def _missing_segments(self, requests: list[Request]) -> list[tuple[Request, Segment]]:
        """What each request has to compute itself: neither in the pool, nor owed by one before."""
        size = self.cache.chunk_size
        owed: set[int] = set()
        work = []
        for request in requests:
            sequence = request.sequence
            known = self.tree.computed_tokens(sequence)
            sealed = [node.chunk_id for node in sequence.nodes]
            while known // size < len(sealed) and sealed[known // size] in owed:
                known += size
            begin = min(known, len(request.prompt) - 1)
            owed.update(sealed[known // size :])
            segment = Segment(
                request.prompt[begin:], sequence.chunk_ids, begin, len(request.prompt), known
            )
            work.append((request, segment))
        return work

    def _prefill_call(self, call: list[tuple[Request, Segment]], num_tokens: int) -> None:
        batch = pack_segments(
            [segment for _, segment in call],
            num_tokens=num_tokens,
            chunk_size=self.cache.chunk_size,
            num_chunks=self.cache.num_chunks,
            options=self.backend.planner,
        )
        params = [request.sampling for request, _ in call]
        args = (self._pool, batch, RowSampling.stack(params, max_segments(num_tokens)))
        program = self._program(prefill_step, args, implementation=self.backend.prefill)
        start = time.perf_counter()
        self._pool, chosen = program(self._split.leaves, *args)
        chosen = np.asarray(chosen)
        self.stats.prefill_seconds += time.perf_counter() - start
        for row, (request, segment) in enumerate(call):
            self.tree.mark_computed(request.sequence, segment.end)
            if segment.end == len(request.prompt):
                self._choose(request, chosen[row : row + 1])

    def _running(self) -> list[Request]:
        """Unfinished requests in the tree's depth-first order: the rows of the next call."""
        requests = (self._requests[sequence] for sequence in self.tree.rows())
        return [request for request in requests if request.finish_reason is None]

    def _current_plan(self, running: list[Request]) -> DecodePlan:
        """The plan of these rows, made anew only when the tree or the rows have changed."""
        key = (self.tree.version, [id(request) for request in running])
        if self._plan is None or key != self._plan_key:
            start = time.perf_counter()
            self._plan, summary = plan_decode(
                [request.sequence.chunk_table for request in running],
                [request.sequence.num_tokens for request in running],
                chunk_size=self.cache.chunk_size,
                num_chunks=self.cache.num_chunks,
                options=self.backend.planner,
                at_least=self._shape_to_keep(len(running)),
            )
            self._plan_key = key
            self._plan_shape = PlanShape.of(self._plan)
            self.stats.plans += 1
            self.stats.plan_seconds += time.perf_counter() - start
            self.stats.shared_tokens = max(self.stats.shared_tokens, summary.common_tokens)
            known = self.stats.plan
            if known is None or summary.unshared_chunk_reads >= known.unshared_chunk_reads:
                self.stats.plan = summary
        return self._plan

    def _shape_to_keep(self, rows: int) -> PlanShape:
        """The last plan's shape, so that its program runs the next plan too, although some rows
        have left; but three quarters of them gone are worth a smaller program."""
        if rows * 4 <= self._plan_shape.rows:
            return replace(self._plan_shape, rows=1)
        return self._plan_shape

    def _program(self, function: Callable, args: tuple, **static):
        program, seconds = PROGRAMS.compiled(function, self._split, args, **static)
        if seconds:
            self.stats.compilations += 1
            self.stats.compile_seconds += seconds
        return program

    def _record(self, request: Request, chosen: np.ndarray) -> bool:
        """Takes over what a device call chose for a row; True if the request finished."""
        new = chosen[chosen != NOTHING]
        self.tree.append(request.sequence, [request.tokens[-1], *new[:-1].tolist()])
        self.stats.decode_tokens += len(new)
        self._choose(request, new)
        return request.finish_reason is not None

    def _choose(self, request: Request, tokens: np.ndarray) -> None:
        request.tokens.extend(tokens.tolist())
        if request.tokens[-1] in self._stop_tokens:
            request.finish_reason = "stop"
        elif len(request.tokens) == request.sampling.max_tokens:
            request.finish_reason = "length"

    def _note_memory(self) -> None:
        per_chunk = self.cache.bytes_per_chunk(self.model.cache_spec)
        held = self.tree.in_use_count * per_chunk
        if held > self.stats.kv_bytes_held:
            unshared = sum(len(sequence.chunk_ids) for sequence in self._requests)
            self.stats.kv_bytes_held = held
            self.stats.kv_bytes_unshared = unshared * per_chunk


def _decode_state(running: list[Request], rows: int) -> DecodeState:
    state = np.zeros((3, rows), np.int32)
    for row, request in enumerate(running):
        state[:, row] = request.tokens[-1], request.sequence.num_tokens, request.remaining
    return DecodeState(*state)
