"""How requests come, are forked, get their tokens and end, whatever the device does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from jax_chunkattn.device.device import Device
from jax_chunkattn.engine.callbacks import Callbacks
from jax_chunkattn.engine.integrity import Integrity, whole
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.requests import Phase, Pinned, Request, Scored, Work
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.engine.text import TextStream
from jax_chunkattn.sampling import TokenLogprobs
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.nodes import SequenceHandle


class Lifecycle:
    """Changes to single requests: scheduler, statistics and callbacks learn of each.

    All but `fail` are parts of a change that its caller makes `whole`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        memory: PrefixMemory,
        stats: EngineStats,
        callbacks: Callbacks,
        integrity: Integrity,
    ):
        self.integrity = integrity
        self._scheduler = scheduler
        self._device = device
        self._memory = memory
        self._stats = stats
        self._callbacks = callbacks

    def accept(self, samples: Sequence[Request], *, forking: bool) -> None:
        """Queues samples of one prompt that fits: of those that are to be forked from it the first,
        and the others once it is computed."""
        first, *others = samples
        queued = [first] if forking else samples
        self._stats.submitted += len(samples)
        if forking:
            first.siblings.extend(others)
            self._scheduler.accepted.update(dict.fromkeys(others))
        for request in queued:
            self._scheduler.enqueue(request)

    def accept_scored(self, group: Sequence[Scored]) -> None:
        """Queues the first of the continuations of a prefix that fit; the others come when the
        prefix is computed, so that what it has of a chunk they share is too."""
        first, *others = group
        first.group.waiting.extend(others)
        self._scheduler.accepted.update(dict.fromkeys(others))
        self._scheduler.enqueue(first)

    def fork(self, parent: Request, child: Request) -> None:
        """Queues a fork that fits, with a copy of its parent's sequence if there is room for it."""
        parent.num_forks += 1
        child.lineage.fork_from(parent.lineage)
        self._fork_sequence(parent, [child])
        self.accept([child], forking=False)

    def prefilled(self, work: Work) -> None:
        """All its tokens are in the pool, or will be before any later call runs."""
        if isinstance(work, Pinned):
            self._scheduler.keep(work)
        elif isinstance(work, Request):
            work.phase = Phase.DECODE
            work.written = work.placed.num_tokens
            siblings = list(self._take_siblings(work))
            self._fork_sequence(work, siblings)
            for sibling in siblings:
                self._scheduler.enqueue(sibling)
        elif isinstance(work, Scored):
            work.phase = Phase.DECODE
            work.group.computed = work
            self._queue_waiting(work)

    def add(
        self,
        request: Request,
        tokens: Sequence[int] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        text: str = "",
        *,
        stream: TextStream | None = None,
        finish_reason: str | None = None,
    ) -> None:
        """What was chosen for a request, or why nothing more will be; see `Request.add`.

        With a `finish_reason` it has ended, even if an error keeps `finish` from being called.
        """
        self._callbacks.note(request)
        request.add(tokens, logprobs, text, stream=stream, finish_reason=finish_reason)

    def finish(self, request: Request) -> None:
        """Ends a request that has chosen its last token."""
        self._stats.finished += 1
        generated_from = len(request.prompt) // self._scheduler.tree.chunk_size
        self._scheduler.finish(request, hold=request.hold)
        text = request.history[request.num_virtual :]
        self._memory.remember(text, request.namespace, from_chunk=generated_from)

    def abort(self, work: Request | Scored) -> None:
        """Ends work because nobody wants it any more."""
        if isinstance(work, Request):
            self.add(work, finish_reason="abort")
            self._stats.aborted += 1
        self._scheduler.finish(work)
        self._queue_waiting(work)

    @whole
    def fail(self, work: Request | Scored, error: BaseException, *, discard: bool = False) -> None:
        """Ends work by an error; `discard` caches nothing of what was computed for it."""
        if work.phase is not Phase.DONE:
            work.error = error
            if isinstance(work, Request):
                work.finish_reason = "error"
                self._stats.failed += 1
            self._scheduler.finish(work, discard=discard)
            self._queue_waiting(work)

    def give_up(self, work: Work, error: BaseException) -> None:
        """Work that cannot be done: it fails, or if it is a prefix it is not pinned any longer."""
        if isinstance(work, Request | Scored):
            self.fail(work, error)
        elif isinstance(work, Pinned) and work in self._scheduler.pinned:
            self._scheduler.unpin(work)

    def _fork_sequence(self, parent: Request, children: Sequence[Request]) -> None:
        """Gives each child a copy of the parent's sequence, if it has one and the pool has room;
        what is copied of chunks is copied for all of them together.

        Without one a child takes what the cache has, like any request. Where full chunks are
        encoded, the last one is copied when the child gets a slot (`engine.tails`).
        """
        if not self._scheduler.exact:
            for child in children:
                child.parent = parent
        tree, sequence = self._scheduler.tree, parent.sequence
        if sequence is None or not tree.is_active(sequence):
            return  # or of a tree before Ctrl-C
        if tree.computed_tokens(sequence) < len(parent.history):
            return
        copies: list[tuple[int, int]] = []
        forked: list[SequenceHandle] = []
        try:
            with suppress(PoolExhausted):  # there is no room for this child, nor for those behind
                for _ in children:
                    copy, pairs = tree.fork(sequence, copy_tail=self._scheduler.exact)
                    forked.append(copy)
                    copies.extend(pairs)
            of_windows = [pair for copy in forked for pair in copy.window_copies]
            self._device.copy_chunks(copies, of_windows)
        except BaseException:
            for copy in forked:
                tree.release(copy)
            raise
        for child, copy in zip(children, forked, strict=False):
            child.sequence, child.found = copy, parent.found
            self._stats.forks += 1

    def _queue_waiting(self, work: Request | Scored) -> None:
        """What waited for it, to be forked or to be like it, stands in the queue by itself."""
        if isinstance(work, Request):
            waiting = self._take_siblings(work)
        else:
            waiting = self._take_others(work)
        for one in waiting:
            self._scheduler.enqueue(one)

    def _take_siblings(self, request: Request) -> list[Request]:
        siblings, request.siblings = request.siblings, []
        return [sibling for sibling in siblings if sibling.phase is not Phase.DONE]

    def _take_others(self, scored: Scored) -> list[Scored]:
        if scored in scored.group.waiting:  # then it is not for it that the others wait
            scored.group.waiting.remove(scored)
            return []
        waiting, scored.group.waiting = scored.group.waiting, []
        return [other for other in waiting if other.phase is not Phase.DONE]
