"""The one thread that advances the engine, and how the event loop talks to it.

The loop leaves word in a queue, which is read between two turns; what the turns bring goes back in
one call for all requests together. Nobody in the loop ever waits for the engine's lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar

from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.engine.outputs import EngineClosed, RequestFailed, StreamEvent
from jax_chunkattn.server.errors import as_api_error
from jax_chunkattn.server.inbox import News, Ticket

Result = TypeVar("Result")

Deliver = Callable[[Ticket, int, News], None]
"""Is told in the event loop what is new of a ticket's sample."""

GATHERED = 0.02  # of a turn's time is waited for those who come together
MOST_GATHERED = 0.05  # seconds

_LOG = logging.getLogger(__name__)


class EngineThread:
    """Runs one engine for an event loop.

    Attributes:
      engine: what is run. Others may use it too, in turns.
      loop: that is told what is new.
      error: what ended the thread before it was to stop, if something did.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, deliver: Deliver):
        self.engine = engine
        self.error: BaseException | None = None
        self.loop = loop
        self._deliver = deliver
        self._work: deque[Callable[[], None]] = deque()
        self._over = False  # nobody reads the queue any longer
        self._end = threading.Lock()
        self._change = threading.Event()
        self._turn_seconds = 0.0
        self._may_come = False  # who asks together, or has an answer and asks again
        self._stopping = False
        self._tickets: dict[Ticket, None] = {}
        self._news: deque[tuple[Ticket, int, News]] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # For the event loop.

    def submit(self, tickets: Sequence[Ticket]) -> asyncio.Future[None]:
        """Queues all these prompts or none, and tells when: the future has what
        `Engine.submit_samples` raises."""
        return asyncio.wrap_future(self.later(partial(self._accept, tickets)))

    def abort(self, tickets: Iterable[Ticket]) -> None:
        """Ends what is left of them before the next turn; returns at once."""
        self._leave(partial(self._abort, list(tickets)))

    async def abort_all(self) -> None:
        """Ends all that is left; returns when that is done."""
        await asyncio.wrap_future(self.later(lambda: self._abort(list(self._tickets))))

    async def call(self, ask: Callable[[Engine], Result]) -> Result:
        """What `ask` returns, called between two turns."""
        return await asyncio.wrap_future(self.later(lambda: ask(self.engine)))

    async def view(self, ask: Callable[[Engine, list[Ticket]], Result]) -> Result:
        """The same with the tickets that are not finished."""
        return await asyncio.wrap_future(self.later(lambda: ask(self.engine, list(self._tickets))))

    async def stop(self, seconds: float = 10.0) -> None:
        """Ends what is left and the thread, which finishes its turn; the engine stays open."""
        self._stopping = True
        self._change.set()
        await asyncio.to_thread(self._thread.join, seconds)

    def later(self, work: Callable[[], Result]) -> Future[Result]:
        """Leaves word of work to do between two turns; what it returns, when it is done."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._leave(run)
        return future

    def _leave(self, work: Callable[[], None]) -> None:
        with self._end:
            if not self._over:
                self._work.append(work)
                return self._change.set()
        work()  # which refuses, or finds nothing left to do

    # In the thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._change.clear()
                self._do_work()
                if self._may_come:
                    self._gather()
                if self._stopping or self._advance() or self._stopping:
                    continue
                self._change.wait()
                self._may_come = True
        except BaseException as error:
            self.error = error
            _LOG.exception("the engine's thread ended")
        finally:
            self._stopping = True
            with self._end:
                self._over = True
            self._do_work()
            left = list(self._tickets)
            self._tell_failures(self.error or EngineClosed("the server stops"))
            for ticket in left:
                for handle in ticket.handles:
                    with suppress(Exception):
                        handle.abort()
            self._send()

    def _do_work(self) -> None:
        while self._work:
            self._work.popleft()()

    def _gather(self) -> None:
        """Takes in who comes in the next moment: the others would wait for all of a call that has
        the first of them alone. A moment is a small part of what a turn takes."""
        end = time.monotonic() + min(GATHERED * self._turn_seconds, MOST_GATHERED)
        while not self._stopping and (left := end - time.monotonic()) > 0:
            if self._change.wait(left):
                self._change.clear()
                self._do_work()

    def _advance(self) -> bool:
        """One turn, if there is anything to do; what came of it is sent."""
        began = time.monotonic()
        try:
            more = self.engine.has_work and self.engine.step()
        except RequestFailed as error:  # of all, which are told below
            _LOG.error("all requests have failed: %s", error)
            more = True
        for ticket in self._tickets:
            for sample, handle in enumerate(ticket.handles):
                if sample not in ticket.ended and handle.finish_reason == "error":
                    self._fail(ticket, sample, handle.error)
        under_way = len(self._tickets)
        self._send()
        self._may_come = len(self._tickets) < under_way
        if more:
            self._turn_seconds = time.monotonic() - began
        return more

    def _accept(self, tickets: Sequence[Ticket]) -> None:
        if self._stopping:
            raise EngineClosed("the server stops")
        accepted = []
        try:
            for ticket in tickets:
                order = ticket.order
                ticket.handles = self.engine.submit_samples(
                    order.prompt,
                    order.params,
                    salt=order.salt,
                    on_event=partial(self._note, ticket),
                )
                accepted.append(ticket)
        except BaseException as error:
            if isinstance(error, EngineClosed):
                self._end_by(error)
            for ticket in accepted:
                ticket.ended.update(range(len(ticket.handles)))
                for handle in ticket.handles:
                    handle.abort()
            raise
        self._tickets.update(dict.fromkeys(tickets))

    def _abort(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            for sample, handle in enumerate(ticket.handles):
                if sample not in ticket.ended:
                    handle.abort()
        self._send()

    def _note(self, ticket: Ticket, sample: int, event: StreamEvent) -> None:
        """The engine's callback, in whichever thread has the turn."""
        if sample in ticket.ended:
            return
        if event.finish_reason is not None:
            ticket.ended.add(sample)
        self._news.append((ticket, sample, event))

    def _fail(self, ticket: Ticket, sample: int, error: BaseException | None) -> None:
        ticket.ended.add(sample)
        if isinstance(error, EngineClosed):
            self._end_by(error)
        elif error is not None:
            _LOG.error("a request failed", exc_info=error)
        failed = as_api_error(error or RequestFailed("the request failed"))
        self._news.append((ticket, sample, failed))

    def _end_by(self, error: BaseException) -> None:
        """There is nothing left to advance."""
        if not self._stopping:
            _LOG.error("the engine is closed: %s", error)
            self.error, self._stopping = error, True

    def _tell_failures(self, error: BaseException) -> None:
        """All that is left ends by an error."""
        for ticket in self._tickets:
            for sample in range(len(ticket.handles)):
                if sample not in ticket.ended:
                    ticket.ended.add(sample)
                    self._news.append((ticket, sample, as_api_error(error)))

    def _send(self) -> None:
        """Gives the loop all that is new, and forgets who has ended."""
        batch = []
        while self._news:
            batch.append(self._news.popleft())
        if not batch:
            return
        for ticket, *_ in batch:
            if len(ticket.ended) == len(ticket.handles):
                self._tickets.pop(ticket, None)
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._hand_over, batch)

    def _hand_over(self, batch: Sequence[tuple[Ticket, int, News]]) -> None:
        for ticket, sample, news in batch:
            self._deliver(ticket, sample, news)
