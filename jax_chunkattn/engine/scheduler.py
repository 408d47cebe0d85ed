"""Who is served next: admission, room in the pool, preemption. Host only, no device.

First come, first served: whoever came first is never passed over, and when the pool runs short it
is the youngest that gives way. So the oldest always advances, and everyone becomes the oldest.
Priorities, where they are given, count before arrival.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Set

from jax_chunkattn.engine.admission import chunks_to_finish
from jax_chunkattn.engine.misses import prefix_hashes
from jax_chunkattn.engine.requests import Phase, Pinned, Request, Scored, Work
from jax_chunkattn.engine.virtual_tokens import InvalidPrefix
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.nodes import Node
from jax_chunkattn.tree.prefix_tree import PrefixTree

Chunk = tuple[bytes, int]  # the salt, and the hash of all tokens to the chunk's end


class Scheduler:
    """Waiting, active, held and pinned work over one prefix tree.

    Attributes:
      tree: where the sequences live.
      accepted: all work that has not ended.
      waiting: work without a slot, in the order of its turns. A fork may wait with a sequence.
      active: work in PREFILL or DECODE, in the same order.
      held: finished requests whose sequences are kept to be forked, the oldest first.
      pinned: prefixes that stay, computed or not yet.
      preemptions: how often a request had to give way.
      max_running: most requests with a slot.
      exact: chunks are stored as they are, so that parts of one can be copied.
      held_back: only who has begun before is admitted.
    """

    def __init__(self, tree: PrefixTree, *, max_running: int, exact: bool = True):
        self.tree = tree
        self.exact = exact
        self.accepted: dict[Work, None] = {}
        self.waiting: list[Work] = []
        self.active: list[Work] = []
        self.held: dict[Request, None] = {}
        self.pinned: dict[Pinned, None] = {}
        self.preemptions = 0
        self.max_running = max_running
        self.held_back = False
        self._pinned_chunks: Counter[Chunk] = Counter()
        self._free_slots = list(range(max_running))

    @property
    def running(self) -> list[Request]:
        """Active requests."""
        return [work for work in self.active if isinstance(work, Request)]

    def require_fit(self, work: Work, name: str = "") -> None:
        """Raises PoolExhausted, whose message begins with `name`, when the pool, less what is
        pinned, can never hold this work, or pinning it would leave accepted work too little."""
        self._require_window_room(work, name)
        if isinstance(work, Pinned):
            with_it = self._pinned_chunks.keys() | self._chunks(work)
            for other in (work, *self.accepted):
                self._require_fit(other, with_it, "with this prefix pinned, ")
        else:
            self._require_fit(work, self._pinned_chunks.keys(), name)

    def require_all_fit(self, tree: PrefixTree) -> None:
        """Raises PoolExhausted when some accepted work, beside what is pinned, could never be held
        by another tree's pool."""
        other = Scheduler(tree, max_running=self.max_running, exact=self.exact)
        for pinned in self.pinned:
            other.pinned[pinned] = None
            other._pinned_chunks.update(self._chunks(pinned))
        for work in (*self.accepted, *self.pinned):
            other._require_window_room(work, "")
            other._require_fit(work, other._pinned_chunks.keys(), "")

    def pin(self, pinned: Pinned) -> None:
        """Queues a prefix that fits, to be computed and kept."""
        self.pinned[pinned] = None
        self._pinned_chunks.update(self._chunks(pinned))
        self.enqueue(pinned)

    def enqueue(self, work: Work) -> None:
        """Puts new work, or work sent back, in its place in the queue."""
        bisect.insort(self.waiting, work, key=lambda work: work.order)
        self.accepted[work] = None
        work.phase = Phase.WAITING

    @property
    def next_waiting(self) -> Work | None:
        """Whose turn it is."""
        if not self.held_back:
            return self.waiting[0] if self.waiting else None
        return next((work for work in self.waiting if work.begun), None)

    def admit_next(self) -> Work | None:
        """Places the first of the queue in the tree and gives it a slot; None if it must wait."""
        work = self.next_waiting
        if work is None:
            return None
        if isinstance(work, Request) and not self._free_slots:
            return None
        if work.sequence is None and not self._place(work):
            return None
        self.waiting.remove(work)
        if isinstance(work, Request):
            work.slot = self._free_slots.pop()
        work.phase = Phase.PREFILL
        bisect.insort(self.active, work, key=lambda work: work.order)
        return work

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Room for tokens of a running request; False when only a preemption can make it."""
        while True:
            try:
                self.tree.reserve(request.placed, num_tokens)
                return True
            except PoolExhausted:
                if not self.drop_idle():
                    return False

    def preempt_youngest(self) -> Work:
        """Sends the youngest active work back to the queue; its tokens are computed again later."""
        victim = self.active[-1]
        self._vacate(victim)
        self._release(victim)
        self.enqueue(victim)
        self.preemptions += 1
        return victim

    def drop_idle(self) -> bool:
        """Gives up one sequence that nobody is computing; False when there is none.

        First those held for forks, the oldest first, then those of forks that wait for a slot, the
        youngest first. What they lose is found again in the cache or computed again.
        """
        if self.held:
            self.drop_held(next(iter(self.held)))
            return True
        for work in reversed(self.waiting):
            if work.sequence is not None:
                self._release(work)
                return True
        return False

    def finish(self, work: Work, *, hold: bool = False, discard: bool = False) -> None:
        """Ends work wherever it stands; `hold` keeps the sequence of a request to be forked, and
        `discard` keeps from the cache what was not there when it came."""
        phase, work.phase = work.phase, Phase.DONE
        self.accepted.pop(work, None)
        if isinstance(work, Request):
            work.parent = None
        if phase in (Phase.PREFILL, Phase.DECODE):
            self._vacate(work)
        elif work in self.waiting:
            self.waiting.remove(work)
        if hold and isinstance(work, Request) and work.sequence is not None:
            self.held[work] = None
        else:
            self._release(work, discard=discard)

    def drop_held(self, request: Request) -> None:
        """Gives up the sequence of a finished request; nothing happens when it has none."""
        if request in self.held:
            del self.held[request]
            self._release(request)

    def keep(self, pinned: Pinned) -> None:
        """A pinned prefix has been computed: it stays, and needs no further work."""
        pinned.phase = Phase.DONE
        del self.accepted[pinned]
        self._vacate(pinned)

    def unpin(self, pinned: Pinned) -> None:
        """A prefix need not stay any longer."""
        del self.pinned[pinned]
        self._pinned_chunks -= Counter(self._chunks(pinned))
        self.finish(pinned)

    def pin_again(self, pinned: Pinned) -> None:
        """Has a prefix that stays written once more, where it is not found any longer."""
        self.unpin(pinned)
        self.pin(pinned)

    def restart(self, tree: PrefixTree) -> None:
        """Puts all work back into the queue, over a new and empty tree."""
        self.tree = tree
        self._pinned_chunks = Counter(chunk for pin in self.pinned for chunk in self._chunks(pin))
        for work in (*self.accepted, *self.held, *self.pinned):
            work.sequence = None
            work.dispatched = 0
            if isinstance(work, Request):
                work.slot = None
                work.in_flight = work.writes_in_flight = 0
                work.siblings = []
            if isinstance(work, Scored):
                work.group.forget()
                work.begin_again()
        self.held.clear()
        self.active.clear()
        self.waiting.clear()
        self._free_slots = list(range(self.max_running))
        for work in dict.fromkeys((*self.accepted, *self.pinned)):
            if isinstance(work, Request) and work.finish_reason is not None:
                work.phase = Phase.DONE
                del self.accepted[work]
            else:
                self.enqueue(work)

    def check(self) -> None:
        """Verifies every invariant; raises AssertionError naming the first one broken."""
        self.tree.check()
        slots = [request.placed_slot for request in self.running]
        assert sorted([*slots, *self._free_slots]) == list(range(self.max_running)), "slots"
        for queue in (self.waiting, self.active):
            orders = [work.order for work in queue]
            assert orders == sorted(orders), "a queue is out of order"
        for work in self.waiting:
            assert work.phase is Phase.WAITING, f"{work.phase} work waits"
        for work in self.active:
            assert work.phase in (Phase.PREFILL, Phase.DECODE), f"{work.phase} work is active"
            assert work.sequence is not None, "active work is not in the tree"
        owners = [
            *self.waiting,
            *self.active,
            *self.held,
            *(pin for pin in self.pinned if pin.phase is Phase.DONE),
        ]
        sequences = [work.sequence for work in owners if work.sequence is not None]
        assert len(sequences) == len(set(sequences)), "two requests share a sequence"
        assert set(sequences) == set(self.tree.rows()), "the tree has sequences of nobody"

    def _place(self, work: Work) -> bool:
        """Inserts the work's tokens, if that leaves every active row room to grow a little."""
        history = work.history
        while True:
            spare = self.tree.room_after_insert(history, work.salt)
            if spare >= self._num_growing(work):
                work.sequence = self.tree.insert(
                    history, work.salt, copy_partial=self.exact, like=work.like
                )
                work.found = self.tree.computed_tokens(work.sequence)
                return True
            if not self.drop_idle():
                return False

    def _num_growing(self, work: Work) -> int:
        """How many rows, this one among them, will need one more chunk than they have."""
        size = self.tree.chunk_size
        growing = 0
        for other in (*self.active, work):
            if isinstance(other, Request):
                at_end = chunks_to_finish(other.num_given, other.params.max_tokens, size)
                has = other.sequence
                held = len(has.chunk_ids) if has is not None else -(-len(other.history) // size)
                growing += at_end > held
        return growing

    def _vacate(self, work: Work) -> None:
        self.active.remove(work)
        if isinstance(work, Request) and work.slot is not None:
            self._free_slots.append(work.slot)
            work.slot = None

    def _release(self, work: Work, *, discard: bool = False) -> None:
        work.dispatched = 0
        if work.sequence is not None:
            sequence, work.sequence = work.sequence, None
            keep = work.found // self.tree.chunk_size if discard else None
            if keep is not None and keep < len(sequence.nodes):
                self._let_find(keep, sequence.nodes[keep])
            self.tree.release(sequence, keep=keep)

    def _let_find(self, chunks: int, node: Node) -> None:
        """Has those who have found the node behind so many chunks found no more than these."""
        for other in (*self.accepted, *self.held):
            nodes = other.sequence.nodes if other.sequence is not None else []
            if len(nodes) > chunks and nodes[chunks] is node:
                other.found = min(other.found, chunks * self.tree.chunk_size)

    def _chunks(self, work: Work) -> set[Chunk]:
        """What names each whole chunk that it comes with, the same for all that share the chunk."""
        return {(work.salt, path) for path in prefix_hashes(work.given, self.tree.chunk_size)}

    def _require_window_room(self, work: Work, name: str) -> None:
        """Where heads with windows have chunks of their own, raises PoolExhausted when they have
        none for this work beside what is pinned, or would have none for a request, and
        InvalidPrefix when it comes behind a learned prefix."""
        room, others = self.tree.window_room, len(self.pinned)
        if room is None:
            return
        if work.virtual is not None:
            raise InvalidPrefix(
                f"{name}heads with windows have chunks of their own in a pool of "
                f"{self.tree.num_chunks}, and a learned prefix, {work.virtual.name!r}, has one for "
                "all heads: give the cache as many window_chunks as num_chunks"
            )
        requests = 1 if isinstance(work, Pinned) else 0
        needed = room.needed(others + 1 + requests, self.tree.chunk_size)
        if needed > room.chunks:
            beside = f"the {others} prefixes pinned" + " and a request" * requests
            raise PoolExhausted(
                f"{name}heads with windows may need {needed} chunks for this beside {beside}, and "
                f"have {room.chunks}"
            )

    def _require_fit(self, work: Work, pinned: Set[Chunk], circumstance: str) -> None:
        size = self.tree.chunk_size
        max_tokens = work.params.max_tokens if isinstance(work, Request) else 1
        needed = chunks_to_finish(work.num_given, max_tokens, size)
        if needed + len(pinned) <= self.tree.num_chunks:
            return  # whichever of the pinned chunks are its own
        beside = len(pinned - self._chunks(work)) if pinned else 0
        available = self.tree.num_chunks - beside
        if needed > available:
            raise PoolExhausted(
                f"{circumstance}a request of {work.num_given} tokens that asks for {max_tokens} "
                f"more needs {needed} chunks of {size} tokens, and can never have more than "
                f"{available}: the pool has {self.tree.num_chunks}, {beside} pinned for others"
            )
