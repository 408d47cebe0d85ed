"""What has become of one HTTP request's answers, from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from jax_chunkattn.engine.handle import RequestHandle
from jax_chunkattn.engine.outputs import StreamEvent
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.tenants import Tenant

News = StreamEvent | ApiError


@dataclass(frozen=True)
class Order:
    """One prompt for the engine, as `Engine.submit_samples` takes it."""

    prompt: Sequence[int]
    params: SamplingParams
    salt: str


class Ticket:
    """The samples of one prompt that the engine has accepted.

    The engine's thread writes `handles` and `ended`; the event loop reads `handles`.

    Attributes:
      order: what was asked for.
      first: the number of its first sample among the request's answers.
      inbox: where its news goes.
      handles: of each sample.
      ended: samples with nothing more to come.
    """

    def __init__(self, order: Order, first: int, inbox: Inbox):
        self.order = order
        self.first = first
        self.inbox = inbox
        self.handles: list[RequestHandle] = []
        self.ended: set[int] = set()


def tickets_of(orders: Iterable[Order], inbox: Inbox) -> list[Ticket]:
    """One for each prompt, whose samples are numbered one behind the other."""
    tickets, first = [], 0
    for order in orders:
        tickets.append(Ticket(order, first, inbox))
        first += order.params.n
    return tickets


class Inbox:
    """News of all answers of one request, in their order, for one reader in the event loop.

    What a slow reader has not taken is joined: it never holds more than the answers' tokens.

    Attributes:
      id: of the request.
      tenant: whose it is.
      gone: the client has.
    """

    def __init__(self, request_id: str, tenant: Tenant) -> None:
        self.id = request_id
        self.tenant = tenant
        self.gone = False
        self._news: deque[tuple[int, News]] = deque()
        self._wake = asyncio.Event()

    @property
    def has_news(self) -> bool:
        """Whether something has not been taken."""
        return bool(self._news)

    def put(self, answer: int, news: News) -> None:
        self._news.append((answer, news))
        self._wake.set()

    def leave(self) -> None:
        """The client has gone: who waits is woken."""
        self.gone = True
        self._wake.set()

    async def take(self) -> list[tuple[int, News]]:
        """All that is new, one event for each answer; nothing when the client has gone."""
        while not self._news and not self.gone:
            self._wake.clear()
            await self._wake.wait()
        if self.gone:
            return []
        taken, self._news = self._news, deque()
        return list(_joined(taken))


def _joined(news: Iterable[tuple[int, News]]) -> Iterable[tuple[int, News]]:
    """Events of an answer in one; an error stands behind what came before it."""
    events: dict[int, StreamEvent] = {}
    errors = []
    for answer, one in news:
        if isinstance(one, ApiError):
            errors.append((answer, one))
        elif answer in events:
            events[answer] = _join(events[answer], one)
        else:
            events[answer] = one
    yield from events.items()
    yield from errors


def _join(first: StreamEvent, second: StreamEvent) -> StreamEvent:
    return replace(
        second,
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
    )
