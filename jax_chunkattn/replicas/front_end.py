"""One engine of many: requests go to replicas, and survive them.

The front end keeps of each request its prompt, its seed, and the tokens so far. When a replica is
lost, its requests go on elsewhere behind these tokens (`Engine.submit(chosen=...)`): their streams
pause, and neither repeat nor miss a token. It has a thread for each replica, and no device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from jax_chunkattn.engine.outputs import EngineClosed, RequestFailed, StreamEvent
from jax_chunkattn.replicas.answer import Answer, Kept
from jax_chunkattn.replicas.router import NoReplica, Router
from jax_chunkattn.replicas.server import Order, Report
from jax_chunkattn.sampling import SamplingParams, each_sample


class ReplicaLost(RuntimeError):
    """A replica does not answer any longer; what it was at is unknown."""


class Link(Protocol):
    """A replica, from the front end's side."""

    def exchange(self, orders: Sequence[Order], aborts: Sequence[int]) -> Report:
        """See `ReplicaServer.exchange`. Raises ReplicaLost."""
        ...

    def close(self) -> None:
        """Ends the replica, if it is there. Harmless at any time."""
        ...


@dataclass(eq=False)
class _Member:
    """A replica and what is to be sent to it.

    Attributes:
      at: requests that it has, or is to be sent, by key.
    """

    name: str
    link: Link
    orders: list[Kept] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    at: dict[int, Kept] = field(default_factory=dict)


class FrontEnd:
    """Serves requests by replicas that may come and go.

    Args:
      router: says where requests go; its replicas are added and lost here.
      start: makes a replica of a name; called in the replica's own thread.
      replicas: how many there are to be; one that is lost is replaced by one of another name.
      most_lost: replicas that may be lost, in all, before none is replaced any longer.
    """

    def __init__(
        self,
        router: Router,
        start: Callable[[str], Link],
        replicas: int,
        *,
        most_lost: int = 100,
    ):
        """Raises ValueError when there is to be no replica."""
        if replicas < 1:
            raise ValueError(f"there must be at least 1 replica, got {replicas}")
        self.router = router
        self._start = start
        self._most_lost = most_lost
        self._change = threading.Condition()
        self._members: dict[str, _Member] = {}
        self._homeless: deque[Kept] = deque()  # no replica is there for them yet
        self._reports: dict[str, tuple[int, int]] = {}
        self._keys, self._names = count(), count()
        self._starting = 0
        self._lost = 0
        self._closed = False
        self._threads: list[threading.Thread] = []
        for _ in range(replicas):
            self._add()

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For callers.

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams = SamplingParams(),
        *,
        salt: str = "",
        session: str | None = None,
    ) -> Answer:
        """Queues one request; a seed is drawn here if there is none. `params.n` must be 1.

        Raises:
          ValueError: for `n`, or a prompt that is no tokens.
          EngineClosed: after `close`.
        """
        if params.n != 1:
            raise ValueError(f"submit starts one, n is {params.n}")
        [params] = each_sample(params)
        kept = Kept(next(self._keys), tuple(prompt), params, salt, session)
        with self._change:
            self._require_open()
            self._send(kept)
        return Answer(self, kept)

    def lose(self, name: str) -> None:
        """Ends a replica as if it had been lost. Raises ValueError when there is none."""
        with self._change:
            if name not in self._members:
                raise ValueError(f"there is no replica {name!r}")
            link = self._members[name].link
        link.close()

    @property
    def replicas(self) -> list[str]:
        """Those that requests may go to now."""
        with self._change:
            return list(self._members)

    @property
    def found(self) -> tuple[int, int]:
        """Prompt tokens that replicas found, and of how many; of those lost, as they last said."""
        with self._change:
            found, prompted = zip(*(self._reports.values() or [(0, 0)]), strict=True)
            return sum(found), sum(prompted)

    def close(self) -> None:
        """Ends all requests, which raise EngineClosed, and all replicas."""
        with self._change:
            self._closed = True
            error = EngineClosed("the front end was closed")
            for kept in [*self._homeless, *self._kept_everywhere()]:
                self._end(kept, error)
            self._homeless.clear()
            members = list(self._members.values())
            self._change.notify_all()
        for member in members:
            member.link.close()
        for thread in self._threads:
            thread.join()

    # For answers.

    def next_event(self, kept: Kept) -> StreamEvent | None:
        """The next event that was not read; None when there will be no more."""
        with self._change:
            self._change.wait_for(lambda: kept.events or kept.ended)
            if kept.events:
                return kept.events.popleft()
            if kept.error is not None:
                raise kept.error
            return None

    def wait(self, kept: Kept) -> Kept:
        """Returns when it has ended; raises the error that ended it."""
        with self._change:
            self._change.wait_for(lambda: kept.ended)
            if kept.error is not None:
                raise kept.error
            return kept

    def abort(self, kept: Kept) -> None:
        with self._change:
            if kept.ended:
                return
            kept.finish_reason = "abort"
            kept.events.append(StreamEvent(finish_reason="abort"))
            member = self._leave(kept)
            if member is not None:
                member.aborts.append(kept.key)
            elif kept in self._homeless:
                self._homeless.remove(kept)
            self._change.notify_all()

    # Requests; all of these hold the lock.

    def _send(self, kept: Kept) -> None:
        """To a replica; if there is none yet, when there is one."""
        try:
            kept.routed = self.router.route(
                (*kept.prompt, *kept.tokens), salt=kept.salt.encode(), session=kept.session
            )
        except NoReplica:
            if not self._starting:
                self._end(kept, RequestFailed("no replica is left"))
            else:
                self._homeless.append(kept)
            return
        member = self._members[kept.routed.replica]
        member.orders.append(kept)
        member.at[kept.key] = kept
        self._change.notify_all()

    def _leave(self, kept: Kept) -> _Member | None:
        """A request is at no replica any longer; the one that it was at."""
        if kept.routed is None:
            return None
        self.router.finish(kept.routed)
        member = self._members.get(kept.routed.replica)
        if member is not None:
            member.at.pop(kept.key, None)
            if kept in member.orders:
                member.orders.remove(kept)
        kept.routed = None
        return member

    def _end(self, kept: Kept, error: Exception) -> None:
        if not kept.ended:
            kept.error = error
            self._leave(kept)
            self._change.notify_all()

    def _take_over(self, member: _Member, report: Report) -> None:
        self.router.apply(member.name, report.cache)
        self._reports[member.name] = report.found, report.prompted
        for key, event in report.events:
            kept = member.at.get(key)
            if kept is None:
                continue  # aborted meanwhile
            if event.tokens and kept.routed is not None:
                self.router.began(kept.routed)
            kept.tokens.extend(event.tokens)
            kept.text.append(event.text)
            kept.logprobs.extend(event.logprobs)
            kept.finish_reason = event.finish_reason
            kept.events.append(event)
            if kept.ended:
                self._leave(kept)
        for key, error in report.failed:
            if key in member.at:
                self._end(member.at[key], error)
        self._change.notify_all()

    def _kept_everywhere(self) -> list[Kept]:
        return [kept for member in self._members.values() for kept in member.at.values()]

    def _require_open(self) -> None:
        if self._closed:
            raise EngineClosed("the front end was closed")

    # Replicas.

    def _add(self) -> None:
        name = f"replica-{next(self._names)}"
        thread = threading.Thread(target=self._serve, args=(name,), name=name, daemon=True)
        self._starting += 1
        self._threads.append(thread)
        thread.start()

    def _serve(self, name: str) -> None:
        """The thread of a replica: starts it, and exchanges with it while it is there."""
        member = self._started(name)
        if member is None:
            return
        try:
            while (work := self._next_work(member)) is not None:
                report = member.link.exchange(*work)
                with self._change:
                    if not self._closed:
                        self._take_over(member, report)
        except ReplicaLost:
            self._replace(member)
        except Exception as error:  # no request is left waiting for a thread that is gone
            self._replace(member, error)
        finally:
            member.link.close()

    def _started(self, name: str) -> _Member | None:
        """A replica that requests may go to; None if it could not be started."""
        try:
            member = _Member(name, self._start(name))
        except Exception as error:
            with self._change:
                self._starting -= 1
                self._give_up(RequestFailed(f"{name} could not be started: {error}"))
            return None
        with self._change:
            self._starting -= 1
            if self._closed:
                member.link.close()
                return None
            self._members[name] = member
            self.router.add(name)
            homeless, self._homeless = self._homeless, deque()
            for kept in homeless:
                self._send(kept)
        return member

    def _next_work(self, member: _Member) -> tuple[list[Order], list[int]] | None:
        """What is to be sent; None when the front end is closed."""
        with self._change:
            self._change.wait_for(
                lambda: self._closed or member.orders or member.aborts or member.at
            )
            if self._closed:
                return None
            orders, member.orders = [kept.order() for kept in member.orders], []
            aborts, member.aborts = member.aborts, []
            return orders, aborts

    def _replace(self, member: _Member, error: Exception | None = None) -> None:
        """A replica is gone: its requests go elsewhere, and another one takes its place."""
        with self._change:
            if self._closed:
                return
            del self._members[member.name]
            self.router.lose(member.name)
            self._lost += 1
            if self._lost <= self._most_lost:
                self._add()
            elif not self._members and not self._starting:
                cause = f": {error}" if error is not None else ""
                self._give_up(RequestFailed(f"too many replicas were lost{cause}"))
            for kept in member.at.values():
                if not kept.ended:
                    kept.routed, kept.moves = None, kept.moves + 1
                    self._send(kept)

    def _give_up(self, error: Exception) -> None:
        """Requests that wait for a replica, when none will come."""
        if not self._members and not self._starting:
            for kept in self._homeless:
                self._end(kept, error)
            self._homeless.clear()
            self._change.notify_all()
