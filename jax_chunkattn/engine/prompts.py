"""What is left to compute of prompts, and whom the queue sends next."""

from __future__ import annotations

from collections.abc import Sequence

from jax_chunkattn.device.device import Device
from jax_chunkattn.device.invocations import Placement
from jax_chunkattn.engine.lifecycle import Lifecycle
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.requests import Phase, Request, Work
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.planning.prefill import Segment, next_call

PromptWork = list[tuple[Work, Segment]]


class Prompts:
    """Chooses the work of each prefill call."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        lifecycle: Lifecycle,
        memory: PrefixMemory,
        stats: EngineStats,
        *,
        prefill_tokens: int,
    ):
        self._admitting: Sequence[Work] = ()
        self._scheduler = scheduler
        self._device = device
        self._lifecycle = lifecycle
        self._memory = memory
        self._stats = stats
        self._prefill_tokens = prefill_tokens

    def choose(self) -> tuple[PromptWork, int]:
        """The segments of the next call, none if there is nothing to compute, and its tokens.

        Of the queue as many are admitted as the call can take.
        """
        work = self._work()
        if not work:
            return [], 0
        align = 1 if self._scheduler.exact else self._scheduler.tree.chunk_size
        call, num_tokens = next_call(work, self._prefill_tokens, align=align)
        call.sort(key=lambda part: part[1].chunk_ids)  # equal prefixes become neighbours
        return call, num_tokens

    def take_admitting(self) -> Sequence[Work]:
        """Who was being admitted when an error occurred, which counts against nobody else then."""
        admitting, self._admitting = self._admitting, ()
        return admitting

    def sent(self, call: PromptWork) -> None:
        """These segments will be in the pool before any later call runs."""
        for owner, segment in call:
            owner.dispatched = segment.end
            self._scheduler.tree.mark_computed(owner.placed, segment.end)
            self._stats.prefill_tokens += segment.end - segment.begin
            if segment.end == len(owner.history):
                self._lifecycle.prefilled(owner)

    def _work(self) -> PromptWork:
        """A segment for each that has something to compute: a chunk that several need is computed
        by the first of them."""
        scheduler = self._scheduler
        chunks: set[int] = set()  # that these segments compute
        segments: PromptWork = []
        total = 0
        for work in [work for work in scheduler.active if work.phase is Phase.PREFILL]:
            total += self._add_segment(work, chunks, segments)
        admitted: list[Request] = []
        while total < self._prefill_tokens:
            self._admitting = scheduler.waiting[:1]
            work = scheduler.admit_next()
            if work is None:
                break
            self._admitted(work)
            total += self._add_segment(work, chunks, segments)
            if isinstance(work, Request):
                admitted.append(work)
        self._admitting = ()
        self._device.place([_placement(request) for request in admitted])
        return segments

    def _admitted(self, work: Work) -> None:
        """Copies the part of a chunk it shares, and notes what the cache had for it."""
        sequence = work.placed
        if sequence.copy is not None:
            copy = sequence.copy
            self._device.copy_chunks([(copy.source_chunk, copy.destination_chunk)])
        if isinstance(work, Request) and not work.admitted:
            work.admitted = True
            if work.samples_next:
                size, found = self._scheduler.tree.chunk_size, sequence.num_cached_tokens
                hit = found // size * size
                use = self._memory.classify(work.prompt, work.salt, hit, found - hit)
                self._stats.prompts += use

    def _add_segment(self, work: Work, chunks: set[int], segments: PromptWork) -> int:
        """Appends what this work has to compute itself: neither in the pool nor in `chunks`, which
        another computes; returns how many tokens."""
        scheduler = self._scheduler
        tree, size = scheduler.tree, scheduler.tree.chunk_size
        sequence, history = work.placed, work.history
        known = max(tree.computed_tokens(sequence), work.dispatched)
        sealed = [node.chunk_id for node in sequence.nodes]
        while known // size < len(sealed) and sealed[known // size] in chunks:
            known = (known // size + 1) * size
        chunks.update(sealed[known // size :])
        begin = min(known, len(history) - 1) if work.samples_next else known
        if not scheduler.exact:
            begin -= begin % size  # a query reads the chunk that it lies in as it was computed
        if begin == len(history):
            if tree.computed_tokens(sequence) >= len(history):
                self._lifecycle.prefilled(work)
            return 0
        slot = work.placed_slot if isinstance(work, Request) else None
        segment = Segment(history[begin:], sequence.chunk_ids, begin, len(history), known, slot)
        segments.append((work, segment))
        return segment.end - segment.begin


def _placement(request: Request) -> Placement:
    return Placement(request.placed_slot, request.prompt, request.tokens, request.params)
