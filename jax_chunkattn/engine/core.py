"""The engine's turn: what is dispatched to the device, and what is made of its results.

Two rounds may be on their way at once. While the device computes one, the host takes over the
results of the round before, updates the tree, and plans and dispatches the next: a row's chosen
token, length and budget stay on the device, so the next call needs none of them from here. The
price is that a row which stops is found out one call later, and rides along frozen meanwhile.

Calls run in the order of their dispatch. That is what makes it safe to free a chunk while a call
that reads or writes it is still on its way: whoever gets it next writes to it in a later call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jax_chunkattn.allocator import PoolExhausted
from jax_chunkattn.engine.device import Call, Device, Results
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.requests import (
    Phase,
    Pinned,
    Request,
    RequestFailed,
    StreamEvent,
    Work,
)
from jax_chunkattn.engine.rows import PlannedRows
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.prefill import Segment, next_call
from jax_chunkattn.prefix_tree import PrefixTree

MAX_ROUNDS = 2
MAX_FAILURES = 3


class Core:
    """Advances all work by one turn at a time; not thread-safe, but callbacks may call all of it.

    A request that was being computed at `MAX_FAILURES` errors in a row, without a token between
    them, ends with the last of them; before that, everyone is computed again.
    """

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        rows: PlannedRows,
        memory: PrefixMemory,
        stats: EngineStats,
        *,
        steps_per_call: int,
        prefill_tokens: int,
        prefill_first: bool,
        stop_tokens: Sequence[int],
    ):
        self.device = device
        self.scheduler = scheduler
        self.stats = stats
        self.memory = memory
        self._rows = rows
        self._steps_per_call = steps_per_call
        self._prefill_tokens = prefill_tokens
        self._prefill_first = prefill_first
        self._stop_tokens = frozenset(stop_tokens)
        self._in_flight: deque[Call] = deque()
        self._news: deque[tuple[Request, StreamEvent]] = deque()
        self._round = 0
        self._blamed: list[Work] | None = None

    @property
    def tree(self) -> PrefixTree:
        return self.scheduler.tree

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.active or self.scheduler.waiting or self._in_flight)

    def advance(self) -> None:
        """Dispatches the next round, if there may be one more, and takes over one call's results.

        An error in it costs a rebuilt pool: all that is needed is computed again from the tokens.
        """
        began = time.perf_counter()
        not_ours = self.stats.compile_seconds + self.device.blocked_seconds
        try:
            self._advance()
        except Exception as error:
            self.recover(error)
        except BaseException:
            self.recover(None)
            raise
        finally:
            not_ours -= self.stats.compile_seconds + self.device.blocked_seconds
            self.stats.host_seconds += time.perf_counter() - began + not_ours

    def warm_up(self, threads: int) -> int:
        """Compiles all programs that any work can need, and returns how many were not there."""
        shapes = self._rows.fix_shapes(self.scheduler.max_running)
        return self.device.warm_up(
            shapes, self._steps_per_call, self._prefill_tokens, threads=threads
        )

    def drain(self) -> None:
        """Waits for all that is on its way and takes it over."""
        try:
            while self._in_flight:
                self._collect(self._in_flight.popleft())
        except Exception as error:
            self.recover(error)
        except BaseException:
            self.recover(None)
            raise

    def fail(self, request: Request, error: BaseException) -> None:
        """Ends a request by an error."""
        if request.phase is not Phase.DONE:
            request.finish_reason, request.error = "error", error
            self.stats.failed += 1
            self.scheduler.finish(request)
            self._orphan(request)

    def abort(self, request: Request) -> None:
        """Ends a request because nobody wants it any more."""
        if request.phase is not Phase.DONE:
            request.finish_reason = "abort"
            self._add_event(request, StreamEvent(finish_reason="abort"))
            self.stats.aborted += 1
            try:
                self.scheduler.finish(request)
                self._orphan(request)
            except Exception as error:
                self.recover(error)
            self._notify_all()

    def fork_sequence(self, parent: Request, child: Request) -> None:
        """Gives `child` a copy of the parent's sequence, if it has one and the pool has room.

        Without one the child takes what the cache has, like any request.
        """
        sequence = parent.sequence
        if sequence is None or self.tree.computed_tokens(sequence) < len(parent.history):
            return
        try:
            copy, copies = self.tree.fork(sequence)
        except PoolExhausted:
            return
        try:
            self.device.copy_chunks(copies)
        except BaseException:
            self.tree.release(copy)
            raise
        child.sequence, child.dispatched = copy, len(child.history)
        self.stats.forks += 1

    def recover(self, error: BaseException | None) -> None:
        """Starts over with an empty pool from the tokens; `error` counts against who was computed.

        Raises:
          RequestFailed: when that fails too; then all requests have failed.
        """
        scheduler = self.scheduler
        blamed = self._blamed or list(scheduler.active) or scheduler.waiting[:1]
        self._blamed = None
        self._in_flight.clear()
        self._rows.forget()
        old = self.tree
        self.stats.recoveries += 1
        self.stats.evictions += old.num_evicted
        scheduler.restart(PrefixTree(old.num_chunks, old.chunk_size, retain=old.retain))
        if error is not None:
            for work in blamed:
                work.failures += 1
                if work.failures >= MAX_FAILURES:
                    self._give_up(work, error)
        try:
            self.device.reset()
        except Exception as fatal:
            for work in list(scheduler.accepted):
                self._give_up(work, fatal)
            raise RequestFailed(f"the pool could not be rebuilt after an error: {error}") from fatal

    def shut_down(self, error: BaseException) -> None:
        """Ends all requests by `error` and gives up what is held or pinned."""
        self._in_flight.clear()
        for work in [*self.scheduler.accepted, *self.scheduler.pinned]:
            self._give_up(work, error)
        for request in list(self.scheduler.held):
            self.scheduler.drop_held(request)

    def check(self) -> None:
        """Verifies tree and scheduler; raises AssertionError naming the first invariant broken."""
        self.scheduler.check()
        if not self._in_flight:
            for request in self.scheduler.running:
                assert not request.in_flight, "tokens in flight in no call"
                assert not request.writes_in_flight, "writes in flight in no call"

    def _give_up(self, work: Work, error: BaseException) -> None:
        if isinstance(work, Request):
            self.fail(work, error)
        elif isinstance(work, Pinned) and work in self.scheduler.pinned:
            self.scheduler.unpin(work)

    def _orphan(self, request: Request) -> None:
        """Samples that waited to be forked from a request stand in the queue by themselves."""
        siblings, request.siblings = request.siblings, []
        for sibling in siblings:
            if sibling.phase is not Phase.DONE:
                self.scheduler.enqueue(sibling)

    @contextmanager
    def _blaming(self, work: list[Work]) -> Iterator[None]:
        """An error in the block counts against this work alone."""
        self._blamed = work
        yield
        self._blamed = None

    def _stop_tokens_of(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | self._stop_tokens

    def _require_progress(self) -> None:
        """Nothing runs and nothing could be started: never wait for what cannot come."""
        if self.scheduler.active:
            raise RuntimeError("active requests have nothing to compute")
        for work in self.scheduler.waiting[:1]:
            self._give_up(work, PoolExhausted("the pool has no room for it, though nothing runs"))

    # A round.

    def _advance(self) -> None:
        had_calls = bool(self._in_flight)
        dispatched = False
        if len({call.round for call in self._in_flight}) < MAX_ROUNDS:
            self._round += 1
            before = len(self._in_flight)
            self._dispatch()
            dispatched = len(self._in_flight) > before
        if self._in_flight and (had_calls or not dispatched):
            self._collect(self._in_flight.popleft())
        elif not dispatched:
            self._require_progress()

    def _dispatch(self) -> None:
        if not self._reserve_rows():
            return  # the calls on their way may end requests and free chunks
        if self._dispatch_prefill() and self._prefill_first:
            return
        rows = [request for request in self._ready() if self._reserve(request)]
        if rows:
            self._dispatch_decode(rows)

    def _ready(self) -> list[Request]:
        """Requests to decode in the next call, in the order of their turns."""
        return [
            work
            for work in self.scheduler.active
            if isinstance(work, Request) and work.phase is Phase.DECODE and work.may_choose > 0
        ]

    def _reserve_rows(self) -> bool:
        """Makes room for the next call of all rows; the youngest give way when there is none.

        Returns False, with room for the older rows only, when results on their way come first.
        """
        for request in self._ready():
            while request.phase is Phase.DECODE and not self._reserve(request):
                if self._in_flight:
                    return False
                self.scheduler.preempt_youngest()
        return True

    def _reserve(self, request: Request) -> bool:
        steps = min(request.may_choose, self._steps_per_call)
        return self.scheduler.reserve(request, request.writes_in_flight + steps)

    def _dispatch_prefill(self) -> bool:
        """Sends what is to compute of prompts, if there is any."""
        work = self._prefill_work()
        if not work:
            return False
        call, num_tokens = next_call(work, self._prefill_tokens)
        self._note_memory()
        call.sort(key=lambda part: part[1].chunk_ids)  # equal prefixes become neighbours
        sent = self.device.prefill(call, num_tokens)
        for owner, segment in call:
            owner.dispatched = segment.end
            self.tree.mark_computed(owner.placed, segment.end)
            self.stats.prefill_tokens += segment.end - segment.begin
            if segment.end == len(owner.history):
                self._prefilled(owner)
        self._send(sent, [1] * len(sent.requests))
        return True

    def _prefill_work(self) -> list[tuple[Work, Segment]]:
        """What is to compute for work in PREFILL, as much of the queue as a call can take admitted.

        A chunk that several need is computed by the first of them.
        """
        owed: set[int] = set()
        segments: list[tuple[Work, Segment]] = []
        total = 0
        for work in [work for work in self.scheduler.active if work.phase is Phase.PREFILL]:
            total += self._add_segment(work, owed, segments)
        placed: list[Request] = []
        while total < self._prefill_tokens:
            with self._blaming(self.scheduler.waiting[:1]):
                work = self.scheduler.admit_next()
                if work is None:
                    break
                self._admitted(work)
                total += self._add_segment(work, owed, segments)
            if isinstance(work, Request):
                placed.append(work)
        self.device.place(placed)
        return segments

    def _admitted(self, work: Work) -> None:
        """Copies the part of a chunk it shares, and notes what the cache had for it."""
        sequence = work.placed
        if sequence.copy is not None:
            copy = sequence.copy
            self.device.copy_chunks([(copy.source_chunk, copy.destination_chunk)])
        if isinstance(work, Request) and not work.admitted:
            work.admitted = True
            if work.samples_next:
                found = sequence.num_cached_tokens
                hit = found // self.tree.chunk_size * self.tree.chunk_size
                self.stats.prompts += self.memory.classify(work.prompt, work.salt, hit, found - hit)

    def _add_segment(self, work: Work, owed: set[int], segments: list[tuple[Work, Segment]]) -> int:
        """Appends what this work has to compute itself: neither in the pool nor owed by another."""
        size = self.tree.chunk_size
        sequence, history = work.placed, work.history
        known = max(self.tree.computed_tokens(sequence), work.dispatched)
        sealed = [node.chunk_id for node in sequence.nodes]
        while known // size < len(sealed) and sealed[known // size] in owed:
            known = (known // size + 1) * size
        owed.update(sealed[known // size :])
        begin = min(known, len(history) - 1) if work.samples_next else known
        if begin == len(history):
            if self.tree.computed_tokens(sequence) >= len(history):
                self._prefilled(work)
            return 0
        segment = Segment(history[begin:], sequence.chunk_ids, begin, len(history), known)
        segments.append((work, segment))
        return segment.end - segment.begin

    def _prefilled(self, work: Work) -> None:
        """All its tokens are in the pool, or will be before any later call runs."""
        if isinstance(work, Pinned):
            self.scheduler.settle(work)
        elif isinstance(work, Request):
            work.phase = Phase.DECODE
            siblings, work.siblings = work.siblings, []
            for sibling in siblings:
                if sibling.phase is not Phase.DONE:
                    self.fork_sequence(work, sibling)
                    self.scheduler.enqueue(sibling)

    def _dispatch_decode(self, rows: list[Request]) -> None:
        self._note_memory()
        by_sequence = {request.placed: request for request in rows}
        ordered = [by_sequence[row] for row in self.tree.rows() if row in by_sequence]
        plan = self._rows.plan(self.tree, ordered)
        steps = [min(request.may_choose, self._steps_per_call) for request in ordered]
        self._send(self.device.decode(ordered, plan, self._steps_per_call), steps)

    def _send(self, call: Call, most_tokens: list[int]) -> None:
        call.round = self._round
        call.most_tokens = most_tokens
        for request, most in zip(call.requests, most_tokens, strict=True):
            request.in_flight += most
            request.writes_in_flight += most * call.decoded
        self._in_flight.append(call)

    def _note_memory(self) -> None:
        """Keeps what was held when most was, and what it would have been without sharing."""
        in_use = self.tree.in_use_count
        if in_use > self.stats.most_chunks_in_use:
            self.stats.most_chunks_in_use = in_use
            self.stats.most_chunks_unshared = sum(
                len(work.placed.chunk_ids) for work in self.scheduler.active
            )

    # Results.

    def _collect(self, call: Call) -> None:
        results = self.device.fetch(call)
        try:
            for request, row, most in zip(call.requests, call.rows, call.most_tokens, strict=True):
                request.in_flight -= most
                request.writes_in_flight -= most * call.decoded
                if request.phase is not Phase.DONE:
                    self._record(request, results, row, decoded=call.decoded)
        finally:
            self._notify_all()

    def _record(self, request: Request, results: Results, row: int, *, decoded: bool) -> None:
        """Takes over what a call chose for a row: all of it, or nothing if an error occurs."""
        new = results.tokens_of(row)
        if not new:
            raise RuntimeError(f"a call chose no token for {request}")
        stopped = new[-1] in self._stop_tokens_of(request)
        stream, text = request.text_stream, ""
        if stream is not None:
            try:
                stream = stream.copy()
                piece = stream.push(new[:-1] if stopped else new)
                text = piece.text
                if piece.stopped_after is not None:
                    stopped, new = True, new[: piece.stopped_after]
                elif stopped or len(request.tokens) + len(new) == request.params.max_tokens:
                    text += stream.finish()
            except Exception as error:
                return self.fail(request, error)
        logprobs = results.logprobs_of(row, request.params.logprobs, len(new))
        if decoded:
            self.tree.append(request.placed, [request.tokens[-1], *new[:-1]])
            self.stats.decode_tokens += len(new)
        request.failures = 0
        request.tokens.extend(new)
        request.logprobs.extend(logprobs)
        request.text += text
        request.text_stream = stream
        reason = None
        if stopped:
            reason = "stop"
        elif len(request.tokens) == request.params.max_tokens:
            reason = "length"
        self._add_event(request, StreamEvent(tuple(new), text, logprobs, reason))
        request.finish_reason = reason  # from here on the request has ended, come what may
        if reason is not None:
            self.stats.finished += 1
            self._finish(request)

    def _finish(self, request: Request) -> None:
        generated_from = len(request.prompt) // self.tree.chunk_size
        self.scheduler.finish(request, hold=request.hold)
        self.memory.remember(request.history, request.salt, from_chunk=generated_from)

    def _add_event(self, request: Request, event: StreamEvent) -> None:
        request.events.append(event)
        self._news.append((request, event))

    def _notify_all(self) -> None:
        """Calls back about all that is new, in its order.

        Only now that a call's results are taken over as a whole: a callback may take over the next.
        """
        while self._news:
            self._notify(*self._news.popleft())

    def _notify(self, request: Request, event: StreamEvent) -> None:
        """Calls back; a callback that raises ends its own request and no other."""
        if request.on_event is None:
            return
        try:
            request.on_event(event)
        except Exception as error:
            request.on_event = None
            request.error = error
            self.fail(request, error)
