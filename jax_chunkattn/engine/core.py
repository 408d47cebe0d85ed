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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from jax_chunkattn.device.device import Call, Device, Results
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.requests import EngineClosed, Phase, Pinned, Request, RequestFailed, Work
from jax_chunkattn.engine.rows import PlannedRows
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.planning.prefill import Segment, next_call
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.prefix_tree import PrefixTree

MAX_ROUNDS = 2
MAX_FAILURES = 3

Params = ParamSpec("Params")
Result = TypeVar("Result")


def whole(
    change: Callable[Concatenate[Core, Params], Result],
) -> Callable[Concatenate[Core, Params], Result]:
    """A change that Ctrl-C, or what else a signal's handler raises, may break off anywhere: `mend`
    then puts right what it has left. Ordinary errors it sees to itself."""

    @wraps(change)
    def made_whole(core: Core, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return change(core, *args, **kwargs)
        except Exception:
            raise
        except BaseException:
            core.torn = True
            raise

    return made_whole


class Core:
    """Advances all work by one turn at a time; not thread-safe, but callbacks may call all of it.

    Attributes:
      torn: a change was broken off: before the next there must be a `mend`.
      calling_back: a callback runs, and may call the engine.
      closed: why nothing more is taken; None before `shut_down`.

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
        self.torn = False
        self.calling_back = False
        self.closed: EngineClosed | None = None
        self._in_flight: deque[Call] = deque()
        self._news: deque[Request] = deque()
        self._round = 0
        self._blamed: list[Work] | None = None

    @property
    def tree(self) -> PrefixTree:
        return self.scheduler.tree

    @property
    def has_work(self) -> bool:
        return self._computes or bool(self._news and self.closed is None)

    @property
    def _computes(self) -> bool:
        return bool(self.scheduler.active or self.scheduler.waiting or self._in_flight)

    def mend(self) -> None:
        """Puts right what a broken off change has left; nothing to do if there was none."""
        if self.torn:
            with suppress(RequestFailed):  # they all have, and know; the pool is tried for again
                self.recover(None)
            if self.closed is not None:
                self.shut_down(self.closed)
            self.torn = False

    def advance(self) -> bool:
        """Dispatches the next round, if there may be one more, and takes over one call's results.

        Returns whether there is more to do. An error costs a rebuilt pool: all that is needed is
        computed again from the tokens.
        """
        if self._computes:
            self._advance_or_recover()
        self._notify_all()
        return self.has_work

    @whole
    def _advance_or_recover(self) -> None:
        began = time.perf_counter()
        not_ours = self.stats.compile_seconds + self.device.blocked_seconds
        try:
            self._advance()
        except Exception as error:
            self.recover(error)
        finally:
            not_ours -= self.stats.compile_seconds + self.device.blocked_seconds
            self.stats.host_seconds += time.perf_counter() - began + not_ours

    def warm_up(self, threads: int) -> int:
        """Compiles all programs that any work can need, and returns how many were not there."""
        shapes = self._rows.fix_shapes(self.scheduler.max_running)
        return self.device.warm_up(
            shapes, self._steps_per_call, self._prefill_tokens, threads=threads
        )

    @whole
    def accept(self, samples: Sequence[Request], *, forking: bool) -> None:
        """Queues samples of one prompt that fits: of those that are to be forked from it the first,
        and the others once it is computed."""
        first, *others = samples
        queued = [first] if forking else samples
        self.stats.submitted += len(samples)
        if forking:
            first.siblings.extend(others)
            self.scheduler.accepted.update(dict.fromkeys(others))
        for request in queued:
            self.scheduler.enqueue(request)

    @whole
    def pin(self, pinned: Pinned) -> None:
        """Queues a prefix that fits, to be computed and kept."""
        self.scheduler.pin(pinned)

    @whole
    def unpin(self, pinned: Pinned) -> None:
        """A prefix need not stay any longer. Harmless when it was released before."""
        if pinned in self.scheduler.pinned:
            self.scheduler.unpin(pinned)

    @whole
    def let_go(self, request: Request) -> None:
        """A request's chunks need not be kept for forks any longer."""
        request.hold = False
        self.scheduler.drop_held(request)

    @whole
    def forget_cached(self) -> None:
        """Gives up all that is pinned, held or cached and not in use by a request that runs."""
        for pinned in list(self.scheduler.pinned):
            self.scheduler.unpin(pinned)
        for request in list(self.scheduler.held):
            self.scheduler.drop_held(request)
        self.tree.reset()
        self.memory.forget()

    @whole
    def drain(self) -> None:
        """Waits for all that is on its way and takes it over."""
        try:
            while self._in_flight:
                self._collect(self._in_flight.popleft())
        except Exception as error:
            self.recover(error)
            self._notify_all()

    @whole
    def fail(self, request: Request, error: BaseException, *, discard: bool = False) -> None:
        """Ends a request by an error; `discard` caches nothing of what was computed for it."""
        if request.phase is not Phase.DONE:
            request.error, request.finish_reason = error, "error"
            self.stats.failed += 1
            self.scheduler.finish(request, discard=discard)
            self._orphan(request)

    @whole
    def abort(self, request: Request) -> None:
        """Ends a request because nobody wants it any more."""
        if request in self.scheduler.accepted:
            self._add(request, finish_reason="abort")
            self.stats.aborted += 1
            try:
                self.scheduler.finish(request)
                self._orphan(request)
            except Exception as error:
                self.recover(error)
            self._notify_all()

    @whole
    def fork(self, parent: Request, child: Request) -> None:
        """Queues a fork that fits, with a copy of its parent's sequence if there is room for it."""
        parent.num_forks += 1
        self._fork_sequence(parent, child)
        self.accept([child], forking=False)

    def _fork_sequence(self, parent: Request, child: Request) -> None:
        """Gives `child` a copy of the parent's sequence, if it has one and the pool has room.

        Without one the child takes what the cache has, like any request.
        """
        sequence = parent.sequence
        if sequence is None or not self.tree.is_active(sequence):
            return  # or of a tree before Ctrl-C
        if self.tree.computed_tokens(sequence) < len(parent.history):
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
        child.found = parent.found
        self.stats.forks += 1

    def recover(self, error: BaseException | None) -> None:
        """Starts over with an empty pool from the tokens; `error` counts against who was computed.

        Raises:
          RequestFailed: when that fails too; then all requests have failed.
        """
        if isinstance(error, EngineClosed):
            return self.shut_down(error)
        scheduler = self.scheduler
        blamed = self._blamed or list(scheduler.active) or scheduler.waiting[:1]
        self._blamed = None
        self._in_flight.clear()
        self._rows.forget()
        old = self.tree
        self.stats.recoveries += 1
        self.stats.evictions += old.num_evicted
        for work in (*scheduler.accepted, *scheduler.held):
            if isinstance(work, Request):
                work.finish_adding()
                self._note_news(work)
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
            cause = "Ctrl-C" if error is None else f"an error: {error}"
            raise RequestFailed(f"the pool could not be rebuilt after {cause}") from fatal

    @whole
    def shut_down(self, error: EngineClosed) -> None:
        """Ends all requests by `error`, the first time, and gives up what is held or pinned."""
        self.closed = self.closed or error
        self._in_flight.clear()
        for work in [*self.scheduler.accepted, *self.scheduler.pinned]:
            self._give_up(work, self.closed)
        for request in list(self.scheduler.held):
            self.scheduler.drop_held(request)
        self.device.close()

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
                    self._fork_sequence(work, sibling)
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
        for request, row, most in zip(call.requests, call.rows, call.most_tokens, strict=True):
            request.in_flight -= most
            request.writes_in_flight -= most * call.decoded
            if request.phase is not Phase.DONE and not request.dropped:
                self._record(request, results, row, decoded=call.decoded)
        self._notify_all()

    def _record(self, request: Request, results: Results, row: int, *, decoded: bool) -> None:
        """Takes over what a call chose for a row: all of it, or nothing if an error occurs."""
        new, no_choice = results.tokens_of(row)
        if not new:
            if no_choice:
                return self._fail_by_numbers(request)
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
        reason = None
        if stopped:
            reason = "stop"
        elif len(request.tokens) + len(new) == request.params.max_tokens:
            reason = "length"
        # From here on it has ended, if it has, come what may.
        self._add(request, new, logprobs, text, stream=stream, finish_reason=reason)
        if reason is not None:
            self.stats.finished += 1
            self._finish(request)
        elif no_choice:
            self._fail_by_numbers(request)

    def _fail_by_numbers(self, request: Request) -> None:
        """Ends a request for which the model gave no numbers; what it computed serves nobody."""
        position = len(request.prompt) + len(request.tokens)
        error = FloatingPointError(
            f"the model's logits for the token at position {position} are NaN or infinite: "
            "its weights are broken, or these tokens overflow in this dtype"
        )
        self.stats.not_finite += 1
        self.fail(request, error, discard=True)

    def _finish(self, request: Request) -> None:
        generated_from = len(request.prompt) // self.tree.chunk_size
        self.scheduler.finish(request, hold=request.hold)
        self.memory.remember(request.history, request.salt, from_chunk=generated_from)

    def _add(self, request: Request, *args, **kwargs) -> None:
        self._note_news(request)
        request.add(*args, **kwargs)

    def _note_news(self, request: Request) -> None:
        if request.on_event is not None:
            self._news.append(request)

    def _notify_all(self) -> None:
        """Calls back about all that is new, in its order.

        Only now that a call's results are taken over as a whole: a callback may take over the next.
        """
        while self._news:
            request = self._news[0]
            self._notify(request)
            if self._news and self._news[0] is request:  # else a callback has seen to it
                self._news.popleft()

    def _notify(self, request: Request) -> None:
        """Calls back; a callback that raises ends its own request and no other."""
        while request.on_event is not None and (event := request.untold) is not None:
            failure = None
            calling, self.calling_back = self.calling_back, True
            try:
                request.num_told += 1
                request.on_event(event)
            except Exception as error:
                failure = error
            finally:
                self.calling_back = calling
            if failure is not None:
                request.on_event, request.error = None, failure
                self.fail(request, failure)
