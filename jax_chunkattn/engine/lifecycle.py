"""How requests come, are forked, get their tokens and end, whatever the device does."""

from __future__ import annotations

from collections.abc import Sequence

from jax_chunkattn.device.device import Device
from jax_chunkattn.engine.callbacks import Callbacks
from jax_chunkattn.engine.integrity import Integrity, whole
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.requests import Phase, Pinned, Request, Work
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.engine.text import TextStream
from jax_chunkattn.sampling import TokenLogprobs
from jax_chunkattn.tree.allocator import PoolExhausted


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

    def fork(self, parent: Request, child: Request) -> None:
        """Queues a fork that fits, with a copy of its parent's sequence if there is room for it."""
        parent.num_forks += 1
        self._fork_sequence(parent, child)
        self.accept([child], forking=False)

    def prefilled(self, work: Work) -> None:
        """All its tokens are in the pool, or will be before any later call runs."""
        if isinstance(work, Pinned):
            self._scheduler.keep(work)
        elif isinstance(work, Request):
            work.phase = Phase.DECODE
            work.written = work.placed.num_tokens
            for sibling in self._take_siblings(work):
                self._fork_sequence(work, sibling)
                self._scheduler.enqueue(sibling)

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
        self._memory.remember(request.history, request.salt, from_chunk=generated_from)

    def abort(self, request: Request) -> None:
        """Ends a request because nobody wants it any more."""
        self.add(request, finish_reason="abort")
        self._stats.aborted += 1
        self._scheduler.finish(request)
        self._queue_siblings(request)

    @whole
    def fail(self, request: Request, error: BaseException, *, discard: bool = False) -> None:
        """Ends a request by an error; `discard` caches nothing of what was computed for it."""
        if request.phase is not Phase.DONE:
            request.error, request.finish_reason = error, "error"
            self._stats.failed += 1
            self._scheduler.finish(request, discard=discard)
            self._queue_siblings(request)

    def give_up(self, work: Work, error: BaseException) -> None:
        """Work that cannot be done: a request fails, a prefix is not pinned any longer."""
        if isinstance(work, Request):
            self.fail(work, error)
        elif isinstance(work, Pinned) and work in self._scheduler.pinned:
            self._scheduler.unpin(work)

    def _fork_sequence(self, parent: Request, child: Request) -> None:
        """Gives `child` a copy of the parent's sequence, if it has one and the pool has room.

        Without one the child takes what the cache has, like any request. Where full chunks are
        encoded, the last one is copied when the child gets a slot (`engine.tails`).
        """
        if not self._scheduler.exact:
            child.parent = parent
        tree, sequence = self._scheduler.tree, parent.sequence
        if sequence is None or not tree.is_active(sequence):
            return  # or of a tree before Ctrl-C
        if tree.computed_tokens(sequence) < len(parent.history):
            return
        try:
            copy, copies = tree.fork(sequence, copy_tail=self._scheduler.exact)
        except PoolExhausted:
            return
        try:
            self._device.copy_chunks(copies, copy.window_copies)
        except BaseException:
            tree.release(copy)
            raise
        child.sequence, child.found = copy, parent.found
        self._stats.forks += 1

    def _queue_siblings(self, request: Request) -> None:
        """Samples that waited to be forked from a request stand in the queue by themselves."""
        for sibling in self._take_siblings(request):
            self._scheduler.enqueue(sibling)

    def _take_siblings(self, request: Request) -> list[Request]:
        siblings, request.siblings = request.siblings, []
        return [sibling for sibling in siblings if sibling.phase is not Phase.DONE]
