"""What engines, handles and iterations do with requests, from any thread and at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from jax_chunkattn.device.device import ResizedPool
from jax_chunkattn.device.weights import matching_values
from jax_chunkattn.engine.core import Core
from jax_chunkattn.engine.incoming import Incoming
from jax_chunkattn.engine.outputs import Completion, EngineClosed, Score, StreamEvent
from jax_chunkattn.engine.requests import Phase, Pinned, Request, Scored, Work
from jax_chunkattn.engine.turns import Turns
from jax_chunkattn.engine.virtual_tokens import InvalidPrefix
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.tree.prefix_tree import PrefixTree

Result = TypeVar("Result")


class Service:
    """One engine's core, used in turns.

    Attributes:
      incoming: makes the requests that are queued here.
      turns: in which all of it happens.
    """

    def __init__(self, core: Core, incoming: Incoming, *, sharing: bool):
        self.incoming = incoming
        self.turns = Turns(core)
        self._core = core
        self._sharing = sharing

    def require_open(self) -> None:
        """Raises EngineClosed after the engine's end."""
        closed = self._core.closed
        if closed is not None:
            raise EngineClosed(*closed.args) from closed.__cause__

    # Requests and prefixes that come. If Ctrl-C keeps one from who has asked for it, nothing is
    # left to run.

    def require_room(self, requests: Sequence[Sequence[Request]]) -> None:
        """Raises PoolExhausted when the pool can never hold one of these samples' prompts."""

        def check() -> None:
            self.require_open()
            self._require_room(requests, numbered=False)

        self.turns.run(check)

    def queue(self, requests: Sequence[Sequence[Request]], *, numbered: bool = False) -> None:
        """Queues the samples of each prompt, all or none; `numbered` has errors name the prompt."""

        def accept() -> None:
            self.require_open()
            self._require_room(requests, numbered=numbered)
            for samples in requests:
                self._core.accept(samples, forking=self._sharing)

        every = [request for samples in requests for request in samples]
        self.turns.run_or_undo(accept, partial(self.drop, every))

    def score(self, groups: Sequence[Sequence[Scored]]) -> list[list[Score]]:
        """The scores of the continuations of each prefix, all by the same weights, or none."""
        works = [work for group in groups for work in group]

        def accept() -> None:
            self.require_open()
            for work in works:
                self._core.scheduler.require_fit(work)
            for group in filter(None, groups):
                self._core.accept_scored(group)

        def score_again() -> bool:
            """Those that were scored by older weights than others."""
            self.require_open()
            newest = max((work.version for work in works), default=0)
            stale = [work for work in works if work.version < newest]
            for work in stale:
                work.begin_again()
                self._core.accept_scored([work])
            return bool(stale)

        self.turns.run_or_undo(accept, partial(self.drop, works))
        try:
            while True:
                scores = [[self._wait(work, work.answer) for work in group] for group in groups]
                if not self.turns.run(score_again):
                    return scores
        except BaseException:
            self.drop(works)
            raise

    def fork(
        self,
        parent: Request,
        params: SamplingParams | None,
        next_token: int | None,
        hold: bool,
        handle: Callable[[Request], Result],
    ) -> Result:
        """Queues a request that goes on from where `parent` stands; returns the `handle` of it."""
        made: list[Request] = []

        def make() -> Result:
            self._settle()
            child = self.incoming.fork(parent, params, next_token, hold)
            self._core.scheduler.require_fit(child)
            made.append(child)
            self._core.fork(parent, child)
            return handle(child)

        return self.turns.run_or_undo(make, partial(self.drop, made))

    def pin(self, pinned: Pinned) -> None:
        """Queues a prefix, to be computed and kept."""

        def accept() -> None:
            self.require_open()
            self._core.scheduler.require_fit(pinned)
            self._core.pin(pinned)

        undo = partial(self.turns.leave, partial(self._core.unpin, pinned))
        self.turns.run_or_undo(accept, undo)

    def add_prefix(self, learned: Pinned) -> None:
        """Queues a learned prefix, to be written and kept; requests may name it from now on.

        Raises InvalidPrefix when there is one of its name, or the pool cannot have it.
        """
        virtual = learned.virtual
        assert virtual is not None, "it is a learned one"

        def accept() -> None:
            self.require_open()
            if virtual.name in self.incoming.prefixes:
                raise InvalidPrefix(f"there is a prefix {virtual.name!r} already: release it first")
            self._core.scheduler.require_fit(learned)
            self._core.pin(learned)
            self.incoming.prefixes[virtual.name] = virtual

        undo = partial(self.turns.leave, partial(self._release_prefix, learned))
        self.turns.run_or_undo(accept, undo)

    def release_prefix(self, learned: Pinned) -> None:
        """A learned prefix has its name no longer, and need not stay."""
        self.turns.change(partial(self._release_prefix, learned))

    def _release_prefix(self, learned: Pinned) -> None:
        virtual, prefixes = learned.virtual, self.incoming.prefixes
        if virtual is not None and prefixes.get(virtual.name) is virtual:
            del prefixes[virtual.name]
        self._core.unpin(learned)

    def update_weights(self, weights: Any, *, finish: bool) -> None:
        """Serves new values for the model's arrays; `finish` lets those who run come to their end
        by the old ones."""

        def values() -> list[Any]:
            self.require_open()
            return matching_values(weights, self._core.device.weights)

        def update() -> bool:
            self.require_open()
            if finish and self._core.hold_back(True):
                self._core.advance()
                return False
            self._settle()
            self._core.update_weights(values())
            return True

        if finish:
            self.turns.run(values)  # what does not fit is refused before anybody waits for it
        try:
            while not self.turns.run(update):
                pass
        finally:
            if finish:
                self.turns.leave(self._admit_all)  # waits for nothing: no Ctrl-C can come between

    def resize(
        self,
        make: Callable[[], tuple[ResizedPool, PrefixTree]],
        resized: Callable[[], None],
    ) -> None:
        """Another pool, and a tree over it, when nothing is on its way; calls `resized` when it is
        there."""

        def change() -> None:
            self._settle()
            self._core.resize(*make())
            resized()

        self.turns.run(change)

    def _settle(self) -> None:
        """Takes over all that is on its way; EngineClosed if the engine is closed then."""
        self.require_open()
        self._core.drain()
        self._core.mend()  # a callback may have kept Ctrl-C to itself
        self.require_open()  # and another may have closed it

    def _admit_all(self) -> None:
        self._core.hold_back(False)

    # Results.

    def next_event(self, request: Request) -> StreamEvent | None:
        """The next unread event; None when the last has been read."""
        while True:
            event, over = self._read_or_advance(request, request.next_event)
            if event is not None or over:
                return event

    def wait(self, request: Request) -> Completion:
        """The whole answer, when it is there."""
        return self._wait(request, request.answer)

    def take_group(
        self, groups: dict[int, list[Request]], *, in_order: bool, enough: int | None
    ) -> tuple[int, list[Request], tuple[Completion, ...]] | None:
        """Takes out of the groups the first, or if `in_order` is not asked for any, all of whose
        requests have ended; its index, it, and the answers. None when no group is left.

        When `enough` of a group have ended without an error the others are aborted, whether or not
        it is its turn.

        Raises RequestFailed when an error ended one of a group that could be the one.
        """

        def turn() -> tuple[int, list[Request], tuple[Completion, ...]] | None:
            if enough is not None:
                self._end_those_with_enough([*groups.values()], enough)
            candidates = [*groups.items()][: 1 if in_order else None]
            for index, group in candidates:
                for request in group:
                    if request.phase is Phase.DONE:
                        request.raise_error()
                if not _unfinished(group):
                    del groups[index]  # in this turn: others may take groups too
                    answers = (request.answer() for request in group)
                    return index, group, tuple(filter(None, answers))
            more = self._core.advance()
            if not more and groups and all(_unfinished(group) for _, group in candidates):
                raise RuntimeError("requests are unfinished and the engine has nothing to do")
            return None

        while groups:
            if (found := self.turns.run(turn)) is not None:
                return found
        return None

    def _end_those_with_enough(self, groups: Iterable[Sequence[Request]], enough: int) -> None:
        """Aborts who is left of groups of which so many have ended without an error."""
        for group in groups:
            left = _unfinished(group)
            failed = sum(request.error is not None for request in group)
            if left and len(group) - len(left) - failed >= enough:
                for request in left:
                    self._core.abort(request)

    def is_computed(self, pinned: Pinned) -> bool:
        """Whether all of a prefix is in the pool."""
        return self.turns.run(lambda: pinned.phase is Phase.DONE and pinned.sequence is not None)

    # Requests and prefixes that go; each may be made twice.

    def abort(self, request: Request) -> None:
        """Ends a request at once, wherever it stands."""
        self.turns.change(partial(self._core.abort, request))

    def drop(self, requests: Iterable[Request | Scored]) -> None:
        """Aborts what nobody has a handle of, at the next turn."""
        for request in requests:
            self.turns.leave(partial(self._core.abort, request))

    def prune(self, request: Request) -> None:
        """Ends a request and all that was forked from it, and keeps nothing of them."""
        self.turns.see_through(partial(self._core.prune, request))

    def hold(self, request: Request) -> bool:
        """A request's chunks are to be kept when it has ended; False when they are gone."""
        return self.turns.run(partial(self._core.hold, request))

    def let_go(self, request: Request) -> None:
        """A request's chunks need not be kept for forks any longer."""
        self.turns.change(partial(self._core.let_go, request))

    def unpin(self, pinned: Pinned) -> None:
        """A prefix need not stay any longer."""
        self.turns.change(partial(self._core.unpin, pinned))

    def close(self) -> None:
        """Ends everything."""
        self.turns.change(partial(self._core.shut_down, EngineClosed("the engine was closed")))

    def _require_room(self, requests: Sequence[Sequence[Request]], *, numbered: bool) -> None:
        for index, (first, *_) in enumerate(requests):
            self._core.scheduler.require_fit(first, f"prompt {index}: " if numbered else "")

    def _wait(self, work: Work, answer: Callable[[], Result | None]) -> Result:
        """What there is when the work is done."""
        while True:
            found, _ = self._read_or_advance(work, answer)
            if found is not None:
                return found

    def _read_or_advance(
        self, request: Work, read: Callable[[], Result | None]
    ) -> tuple[Result | None, bool]:
        """What there is to read, and whether there will be no more; if neither, after a turn.

        Raises RequestFailed when all is read and an error ended it.
        """

        def turn() -> tuple[Result | None, bool]:
            found = read()
            if found is not None:
                return found, False
            if request.phase is Phase.DONE:
                request.raise_error()
                return None, True
            if not self._core.advance() and request.phase is not Phase.DONE:
                raise RuntimeError("a request is unfinished and the engine has nothing to do")
            return None, False

        return self.turns.run(turn)


def _unfinished(requests: Sequence[Request]) -> list[Request]:
    return [request for request in requests if request.phase is not Phase.DONE]
