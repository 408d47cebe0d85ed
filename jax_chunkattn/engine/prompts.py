"""What is left to compute of prompts, and whom the queue sends next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from jax_chunkattn.device.device import Device
from jax_chunkattn.device.invocations import Placement
from jax_chunkattn.engine.in_flight import ScoredPart
from jax_chunkattn.engine.lifecycle import Lifecycle
from jax_chunkattn.engine.misses import PrefixMemory, PromptUse
from jax_chunkattn.engine.requests import Phase, Request, Scored, Work
from jax_chunkattn.engine.residency import Residency
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.engine.tails import Tails
from jax_chunkattn.engine.virtual_tokens import write_missing
from jax_chunkattn.planning.prefill import Segment, next_call
from jax_chunkattn.planning.prefill_round import calls_of_round
from jax_chunkattn.tiers.store import Tier

PromptWork = list[tuple[Work, Segment]]


class Prompts:
    """Chooses the work of the prefill calls of each round."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        lifecycle: Lifecycle,
        memory: PrefixMemory,
        tails: Tails | None,
        stats: EngineStats,
        residency: Residency,
        *,
        prefill_tokens: int,
        call_costs: Mapping[int, int] | None,
    ):
        self._admitting: Sequence[Work] = ()
        self._scheduler = scheduler
        self._device = device
        self._lifecycle = lifecycle
        self._memory = memory
        self._tails = tails
        self._stats = stats
        self._residency = residency
        self._prefill_tokens = prefill_tokens
        self._call_costs = call_costs

    def choose(self) -> Iterator[tuple[PromptWork, int]]:
        """The segments of each call of a round, and the call's tokens; none if there is nothing to
        compute. A call must be `sent` before the next is asked for.

        Of the queue as many are admitted as the calls can take, by the first of them.
        """
        work = self._work(admit=True)
        if not work:
            return
        tree = self._scheduler.tree
        whole = not self._scheduler.exact or tree.window_room is not None
        align = tree.chunk_size if whole else 1
        spans = [(segment.begin, segment.end) for _, segment in work]
        sizes = calls_of_round(spans, self._prefill_tokens, costs=self._call_costs, align=align)
        for number, size in enumerate(sizes):
            if number:
                work = self._work(admit=False)
            call, num_tokens = next_call(work, size, align=align)
            if not call:
                return
            call = [(owner, self._fill(owner, segment)) for owner, segment in call]
            call.sort(key=lambda part: part[1].chunk_ids)  # equal prefixes become neighbours
            yield call, num_tokens

    def _fill(self, work: Work, segment: Segment) -> Segment:
        """A segment that has room for heads with windows, where they have chunks of their own."""
        tree = self._scheduler.tree
        columns = tree.fill(work.placed, segment.begin, segment.end)
        return replace(segment, window_columns=columns) if columns else segment

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

    def _work(self, *, admit: bool) -> PromptWork:
        """A segment for each that has something to compute, of the queue too if it may `admit`: a
        chunk that several need is computed by the first of them."""
        scheduler = self._scheduler
        chunks: set[int] = set()  # that these segments compute
        segments: PromptWork = []
        total = 0
        for work in [work for work in scheduler.active if work.phase is Phase.PREFILL]:
            total += self._add_segment(work, chunks, segments)
        admitted: list[Request] = []
        tails: list[tuple[int, int]] = []  # to copy, from slot to slot
        while admit and total < self._prefill_tokens:
            self._admitting = [one for one in [scheduler.next_waiting] if one is not None]
            work = scheduler.admit_next()
            if work is None:
                break
            self._admitted(work, tails)
            total += self._add_segment(work, chunks, segments)
            if isinstance(work, Request):
                admitted.append(work)
        self._admitting = ()
        if self._tails is not None:
            self._device.copy_tails(tails)
            self._tails.claim(admitted)
        self._device.place([_placement(request) for request in admitted])
        return segments

    def _admitted(self, work: Work, tails: list[tuple[int, int]]) -> None:
        """Copies the part of a chunk it shares, or adds to `tails` what will be copied of its
        parent's, and notes what the cache had for it."""
        sequence = work.placed
        if sequence.copy is not None:
            copy = sequence.copy
            pair = copy.source_chunk, copy.destination_chunk
            self._device.copy_chunks([pair], sequence.window_copies)
        if work.virtual is not None:
            write_missing(work.virtual, sequence, self._scheduler.tree, self._device)
        loads = self._residency.fetch(sequence)
        if self._tails is not None and isinstance(work, Request):
            self._take_tail(self._tails, work, tails)
        if isinstance(work, Request) and not work.admitted:
            work.admitted = True
            if work.samples_next:
                work.use = self._use_of(work, loads)
                self._stats.prompts += work.use

    def _use_of(self, work: Work, loads: Mapping[Tier, int]) -> PromptUse:
        """Where the tokens of its prompt come from, with chunks that are on their way."""
        sequence, size = work.placed, self._scheduler.tree.chunk_size
        found = max(0, sequence.num_cached_tokens - work.num_virtual)
        hit = found // size * size
        copied = found - hit
        if loads:
            hit, copied = hit + sum(loads.values()) * size, 0
        matched = sequence.num_matched_tokens - work.num_virtual
        use = self._memory.classify(work.prompt, work.namespace, hit, copied, matched)
        return use.of_which(loads.get(Tier.HOST, 0) * size, loads.get(Tier.DISK, 0) * size)

    def _take_tail(self, of: Tails, fork: Request, tails: list[tuple[int, int]]) -> None:
        """Has a fork begin with its parent's tail, if that is still there and all before it is."""
        source, tree, length = of.to_begin_with(fork), self._scheduler.tree, len(fork.history)
        fork.parent, fork.written = None, 0
        if source is None:
            return
        if tree.computed_tokens(fork.placed) < length - length % tree.chunk_size:
            return
        tails.append((source, fork.placed_slot))
        tree.mark_computed(fork.placed, length)

    def _add_segment(self, work: Work, chunks: set[int], segments: PromptWork) -> int:
        """Appends what this work has to compute itself: neither in the pool nor in `chunks`, which
        another computes; returns how many tokens."""
        scheduler = self._scheduler
        tree, size = scheduler.tree, scheduler.tree.chunk_size
        sequence, history = work.placed, work.history
        known, stored = tree.computed_tokens(sequence), tree.stored_tokens(sequence)
        if known == stored:  # else windows lack a part of what has been computed
            known = stored = max(stored, work.dispatched)  # a part of a chunk, it may be
        sealed = [node.chunk_id for node in sequence.nodes]
        while known // size < len(sealed) and sealed[known // size] in chunks:
            known = (known // size + 1) * size
        first = known // size
        if first < len(sealed) and self._residency.is_coming(sequence.nodes[first]):
            return 0
        chunks.update(sealed[known // size :])
        begin, written = min(known, work.needed_from), max(known, stored)
        if begin < known - 1:  # else its windows are those of the one behind it
            known = begin = tree.begin_of(sequence, begin)
        tree.expect(sequence, known)
        if not scheduler.exact and begin < len(history):
            begin -= begin % size  # a query reads the chunk that it lies in as it was computed
        if begin == len(history):
            if tree.computed_tokens(sequence) >= len(history):
                self._lifecycle.prefilled(work)
            return 0
        slot = work.placed_slot if isinstance(work, Request) else None
        segment = Segment(history[begin:], sequence.chunk_ids, begin, len(history), written, slot)
        if isinstance(work, Scored):
            segment = replace(segment, targets=work.targets(begin), top=work.top)
        segments.append((work, segment))
        return segment.end - segment.begin


def scored_parts(call: PromptWork) -> list[ScoredPart]:
    """What a call of these segments scores for each, in their order."""
    parts, begin = [], 0
    for work, segment in call:
        count = segment.num_scored
        if isinstance(work, Scored) and count:
            parts.append(ScoredPart(work, segment.end - count, range(begin, begin + count)))
            begin += count
    return parts


def _placement(request: Request) -> Placement:
    where = request.placed_slot, request.prompt, request.tokens
    return Placement(*where, request.params, request.num_virtual)
