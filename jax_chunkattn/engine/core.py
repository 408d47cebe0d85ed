"""The engine's turn: what is dispatched to the device, and what is made of its results.

Two rounds may be on their way at once (`engine.in_flight`): a row's chosen token, length and budget
stay on the device, so the next call needs none of them from here. The price is that a row which
stops is found out one call later, and rides along frozen meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jax_chunkattn.device.device import Device, ResizedPool, WeightsDeleted
from jax_chunkattn.device.weights import PartlyReplaced, Replacement
from jax_chunkattn.engine.callbacks import Callbacks
from jax_chunkattn.engine.in_flight import CallsInFlight
from jax_chunkattn.engine.integrity import Integrity, whole
from jax_chunkattn.engine.lifecycle import Lifecycle
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.outputs import EngineClosed, RequestFailed
from jax_chunkattn.engine.prompts import Prompts, PromptWork, scored_parts
from jax_chunkattn.engine.recording import Recorder
from jax_chunkattn.engine.requests import Phase, Pinned, Request, Scored
from jax_chunkattn.engine.residency import Residency
from jax_chunkattn.engine.rows import PlannedRows
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.engine.tails import Tails
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.prefix_tree import PrefixTree

MAX_FAILURES = 3


class Core:
    """Advances all work by one turn at a time; not thread-safe, but callbacks may call all of it.

    Attributes:
      device, scheduler: what all of it is done with; the tree is the scheduler's.
      stats: counters, but for those that the device keeps (`Device.counters`).
      integrity: whether a change was broken off: before the next there must be a `mend`.
      callbacks: what requests' callbacks have not been told yet.
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
        tails: Tails | None,
        residency: Residency,
        *,
        steps_per_call: int,
        prefill_tokens: int,
        call_costs: Mapping[int, int] | None,
        prefill_first: bool,
        stop_tokens: Sequence[int],
    ):
        self.device = device
        self.scheduler = scheduler
        self.stats = stats
        self.integrity = Integrity()
        self.callbacks = Callbacks()
        self.closed: EngineClosed | None = None
        self._memory = memory
        self._rows = rows
        self._steps_per_call = steps_per_call
        self._prefill_tokens = prefill_tokens
        self._prefill_first = prefill_first
        self._in_flight = CallsInFlight()
        self._new_weights: tuple[Replacement, int] | None = None  # and the version they are
        self._new_pool: tuple[ResizedPool, PrefixTree] | None = None
        self._lifecycle = Lifecycle(
            scheduler, device, memory, stats, self.callbacks, self.integrity
        )
        self._tails = tails
        self._residency = residency
        self._prompts = Prompts(
            scheduler,
            device,
            self._lifecycle,
            memory,
            self._tails,
            stats,
            residency,
            prefill_tokens=prefill_tokens,
            call_costs=call_costs,
        )
        self._recorder = Recorder(scheduler, self._lifecycle, stats, stop_tokens)

    @property
    def tree(self) -> PrefixTree:
        return self.scheduler.tree

    @property
    def has_work(self) -> bool:
        return self._computes or bool(self.callbacks and self.closed is None)

    @property
    def _computes(self) -> bool:
        return bool(self.scheduler.active or self.scheduler.waiting or self._in_flight)

    # A turn.

    def advance(self) -> bool:
        """Dispatches the next round, if there may be one more, and takes over one call's results.

        Returns whether there is more to do. An error costs a rebuilt pool: all that is needed is
        computed again from the tokens.
        """
        if self._computes:
            self._turn_or_recover()
        self._call_back()
        return self.has_work

    def _turn(self) -> None:
        had_calls, sent = bool(self._in_flight), False
        if not (self._in_flight or self.scheduler.active or self.scheduler.next_waiting):
            if not self.callbacks.depth:
                return  # all who wait are held back
            self.scheduler.held_back = False  # a callback waits for them, and all for the callback
        self._residency.collect(self.tree)
        # Without room for all rows, the calls on their way come first: they may end requests.
        if self._in_flight.begin_round() and self._reserve_rows():
            sent = self._send_prompts()
            if not (sent and self._prefill_first):
                sent = self._send_decode() or sent
        if self._in_flight and (had_calls or not sent):
            self._collect()
        elif not sent and not self._residency.wait():
            self._require_progress()
        self._residency.save()

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

    def _send_prompts(self) -> bool:
        """Sends what is to compute of prompts, if there is any; the queue comes in by it."""
        sent = False
        for call, num_tokens in self._prompts.choose():
            self._send_prefill(call, num_tokens)
            sent = True
        return sent

    def _send_prefill(self, call: PromptWork, num_tokens: int) -> None:
        """Sends one call, which has these segments."""
        self._note_memory()
        completed = {
            row: owner
            for row, (owner, segment) in enumerate(call)
            if isinstance(owner, Request)
            and owner.samples_next
            and segment.end == len(owner.history)
        }
        slots: list[int | None] = [None] * len(call)
        for row, request in completed.items():
            slots[row] = request.placed_slot
        segments = [segment for _, segment in call]
        sent = self.device.prefill(segments, slots, num_tokens, self.tree.window_ids)
        self._prompts.sent(call)
        rows, requests = [*completed], [*completed.values()]
        self._in_flight.add(sent, requests, rows, [1] * len(rows), scored_parts(call))

    def _send_decode(self) -> bool:
        """Sends K steps of all rows that there is room for, if there are any."""
        rows = {request.placed: request for request in self._ready() if self._reserve(request)}
        if not rows:
            return False
        self._note_memory()
        ordered = [rows[row] for row in self.tree.in_order(rows)]
        plan = self._rows.plan(self.tree, ordered)
        slots = [request.placed_slot for request in ordered]
        sent = self.device.decode(slots, plan, self._steps_per_call)
        most = [min(request.may_choose, self._steps_per_call) for request in ordered]
        self._in_flight.add(sent, ordered, range(len(ordered)), most)
        return True

    def _collect(self) -> None:
        """Takes over the oldest call's results, and calls back."""
        sent = self._in_flight.take_oldest()
        logprobs = any(request.wants_logprobs for request in sent.requests)
        results = self.device.fetch(sent.call, logprobs=logprobs)
        for request, row in zip(sent.requests, sent.rows, strict=True):
            if request.phase is not Phase.DONE and not request.dropped:
                self._recorder.record(request, results, row, decoded=sent.call.decoded)
        for part in sent.scored:
            if part.work.phase is not Phase.DONE:
                self._recorder.record_scores(part, results)
        self._call_back()

    def _call_back(self) -> None:
        """Only when a call's results are taken over as a whole: a callback may take over the
        next."""
        self.callbacks.tell(self._lifecycle.fail)

    def _require_progress(self) -> None:
        """Nothing runs and nothing could be started: never wait for what cannot come."""
        if self.scheduler.active:
            raise RuntimeError("active requests have nothing to compute")
        if (work := self.scheduler.next_waiting) is not None:
            error = PoolExhausted("the pool has no room for it, though nothing runs")
            self._lifecycle.give_up(work, error)

    def _ready(self) -> list[Request]:
        """Requests to decode in the next call, in the order of their turns."""
        return [
            work
            for work in self.scheduler.active
            if isinstance(work, Request) and work.phase is Phase.DECODE and work.may_choose > 0
        ]

    def _reserve(self, request: Request) -> bool:
        steps = min(request.may_choose, self._steps_per_call)
        return self.scheduler.reserve(request, request.writes_in_flight + steps)

    def _note_memory(self) -> None:
        """Keeps what was held when most was, and what it would have been without sharing."""
        in_use, stats = self.tree.in_use_count, self.stats
        if in_use > stats.most_chunks_in_use:
            active = [work.placed for work in self.scheduler.active]
            stats.most_chunks_in_use = in_use
            stats.most_chunks_unshared = sum(len(sequence.chunk_ids) for sequence in active)
            stats.most_window_chunks_in_use = self.tree.window_in_use_count
            stats.most_window_chunks_unshared = sum(map(self.tree.count_windowed, active))

    @whole
    def _turn_or_recover(self) -> None:
        began = time.perf_counter()
        not_ours = self._device_seconds
        try:
            self._turn()
        except Exception as error:
            self.recover(error)
        finally:
            not_ours -= self._device_seconds
            self.stats.host_seconds += time.perf_counter() - began + not_ours

    @property
    def _device_seconds(self) -> float:
        """Spent compiling, or waiting for results."""
        return self.device.counters.compile_seconds + self.device.counters.blocked_seconds

    # Changes between turns.

    @whole
    def accept(self, samples: Sequence[Request], *, forking: bool) -> None:
        """Queues samples of one prompt that fits; `forking` computes it for the first alone."""
        self._lifecycle.accept(samples, forking=forking)

    @whole
    def accept_scored(self, group: Sequence[Scored]) -> None:
        """Queues continuations of one prefix that fit, to be scored."""
        self._lifecycle.accept_scored(group)

    @whole
    def fork(self, parent: Request, child: Request) -> None:
        """Queues a fork that fits, with a copy of its parent's sequence if there is room for it.

        Raises:
          EngineClosed: when the model's weights have been deleted.
        """
        try:
            self._lifecycle.fork(parent, child)
        except WeightsDeleted as error:
            closed = _closed_by(error)
            self.shut_down(closed)
            raise closed from error.__cause__

    @whole
    def abort(self, request: Request | Scored) -> None:
        """Ends work because nobody wants it any more."""
        if request in self.scheduler.accepted:
            self._abort(request)
            self._call_back()

    def _abort(self, request: Request | Scored) -> None:
        try:
            self._lifecycle.abort(request)
        except Exception as error:
            self.recover(error)

    @whole
    def prune(self, request: Request) -> None:
        """Ends a request and all that was forked from it, and keeps nothing of them."""
        live = [*self.scheduler.accepted, *self.scheduler.held]
        for one in request.lineage.family(work for work in live if isinstance(work, Request)):
            one.hold = False
            self.scheduler.drop_held(one)
            if one in self.scheduler.accepted:
                self._abort(one)
        self._call_back()

    @whole
    def hold(self, request: Request) -> bool:
        """A request's chunks are to be kept for forks when it has ended; False when they are gone
        already."""
        if request.phase is Phase.DONE:
            return request in self.scheduler.held
        request.hold = True
        return True

    @whole
    def let_go(self, request: Request) -> None:
        """A request's chunks need not be kept for forks any longer."""
        request.hold = False
        self.scheduler.drop_held(request)

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
    def forget_cached(self) -> None:
        """Gives up all that is pinned, held or cached and not in use by a request that runs.
        Learned prefixes are written again."""
        for pinned in list(self.scheduler.pinned):
            if pinned.virtual is None or pinned.prompt:
                self.scheduler.unpin(pinned)
        for request in list(self.scheduler.held):
            self.scheduler.drop_held(request)
        self._residency.forget()
        self.tree.reset()
        self._memory.forget()
        for learned in list(self.scheduler.pinned):
            self.scheduler.pin_again(learned)

    @whole
    def drain(self) -> None:
        """Waits for all that is on its way and takes it over."""
        try:
            while self._in_flight:
                self._collect()
        except Exception as error:
            self.recover(error)
            self._call_back()

    # Weights.

    @whole
    def update_weights(self, values: Sequence[Any]) -> None:
        """New values for all arrays of the model, when nothing is on its way; all that was computed
        by the old ones is forgotten, and computed again for those who go on.

        Raises:
          EngineClosed: when only some of the arrays could be replaced, or all and something failed
            behind that; another error when none.
        """
        self._residency.save()
        version = self.stats.weights_version + 1
        self._new_weights = Replacement(values), version
        try:
            self._replace_weights()
        except Exception as error:
            self._new_weights = None
            if not isinstance(error, PartlyReplaced) and self.stats.weights_version < version:
                raise
            closed = _closed_by(error)
            self.shut_down(closed)
            raise closed from error
        self._memory.forget()
        self._start_over()

    @whole
    def resize(self, pool: ResizedPool, tree: PrefixTree) -> None:
        """Another pool, when nothing is on its way. What is computed leaves the old one, for who
        finds it there or computes it again.

        Raises:
          PoolExhausted: when accepted work does not fit; nothing has changed then.
          Exception: when the pool cannot be had; the old one is there then, and empty.
        """
        self.scheduler.require_all_fit(tree)
        self._residency.leave(self.tree)
        before = self.device.as_it_is, self.tree.emptied()
        self._new_pool = pool, tree
        try:
            self._replace_pool()
        except Exception:
            self._new_pool = before
            self._replace_pool()
            raise

    def _replace_pool(self) -> None:
        """Also what is left of it to do when it was broken off."""
        if self._new_pool is not None:
            pool, tree = self._new_pool
            self._forget_pool()
            self.scheduler.restart(tree)
            self._rows.resize(pool.invocations.most_columns)
            self.device.resize(pool)
            self._new_pool = None

    def hold_back(self, held_back: bool) -> bool:
        """Has nobody begin who has not, or anybody again; whether somebody runs."""
        self.scheduler.held_back = held_back
        begun = any(work.begun for work in self.scheduler.waiting)
        return bool(self.scheduler.active or self._in_flight or begun)

    def _replace_weights(self) -> None:
        """Also what is left of it to do when it was broken off."""
        if self._new_weights is not None:
            new, version = self._new_weights
            self.device.replace_weights(new)
            self.stats.weights_version = version
            self._residency.rename()
            self._new_weights = None

    def _start_over(self) -> None:
        """Everything is to be computed again from the tokens, in an empty tree."""
        self._forget_pool()
        self.scheduler.restart(self.tree.emptied())

    def _forget_pool(self) -> None:
        """Nothing that the pool has counts any longer."""
        self._in_flight.clear()
        self._rows.forget()
        self._residency.start_over()
        if self._tails is not None:
            self._tails.forget()
        self.stats.evictions += self.tree.num_evicted

    def warm_up(self, threads: int, *, scores: bool) -> int:
        """Compiles all programs that any work can need, those that score if there are to be
        `scores`, and returns how many were not there."""
        shapes = self._rows.fix_shapes(self.scheduler.max_running)
        return self.device.warm_up(
            shapes,
            self._steps_per_call,
            self._prefill_tokens,
            threads=threads,
            scores=scores,
            transfers=self._residency.moves,
        )

    # Errors, and the end.

    def mend(self) -> None:
        """Puts right what a broken off change has left; nothing to do if there was none."""
        if self.integrity.torn:
            self.scheduler.held_back = False  # whoever holds them back does so in each turn
            try:
                if self._new_weights is not None and not self._new_weights[0].begun:
                    self._new_weights = None  # whoever gave them knows that they did not come
                self._replace_weights()
                self._replace_pool()
            except Exception as error:
                self.closed = self.closed or _closed_by(error)
            with suppress(RequestFailed):  # they all have, and know; the pool is tried for again
                self.recover(None)
            if self.closed is not None:
                self.shut_down(self.closed)
            self.integrity.torn = False

    def recover(self, error: BaseException | None) -> None:
        """Starts over with an empty pool from the tokens; `error` counts against who was computed.

        Raises:
          RequestFailed: when that fails too; then all requests have failed.
        """
        if isinstance(error, WeightsDeleted):
            return self.shut_down(_closed_by(error))
        scheduler = self.scheduler
        suspects = self._prompts.take_admitting() or list(scheduler.active) or scheduler.waiting[:1]
        self.stats.recoveries += 1
        for work in (*scheduler.accepted, *scheduler.held):
            if isinstance(work, Request):
                work.finish_adding()
                self.callbacks.note(work)
        self._start_over()
        if error is not None:
            for work in suspects:
                work.failures += 1
                if work.failures >= MAX_FAILURES:
                    self._lifecycle.give_up(work, error)
        try:
            self.device.reset()
        except Exception as fatal:
            for work in list(scheduler.accepted):
                self._lifecycle.give_up(work, fatal)
            cause = "Ctrl-C" if error is None else f"an error: {error}"
            raise RequestFailed(f"the pool could not be rebuilt after {cause}") from fatal

    @whole
    def shut_down(self, error: EngineClosed) -> None:
        """Ends all requests by `error`, the first time, and gives up what is held or pinned."""
        self.closed = self.closed or error
        self._in_flight.clear()
        for work in [*self.scheduler.accepted, *self.scheduler.pinned]:
            self._lifecycle.give_up(work, self.closed)
        for request in list(self.scheduler.held):
            self.scheduler.drop_held(request)
        self._residency.close()
        self.device.close()

    def check(self) -> None:
        """Verifies tree and scheduler; raises AssertionError naming the first invariant broken."""
        self.scheduler.check()
        if not self._in_flight:
            for request in self.scheduler.running:
                assert not request.in_flight, "tokens in flight in no call"
                assert not request.writes_in_flight, "writes in flight in no call"


def _closed_by(error: Exception) -> EngineClosed:
    closed = EngineClosed(f"the engine closed itself: {error}")
    closed.__cause__ = error.__cause__
    return closed
