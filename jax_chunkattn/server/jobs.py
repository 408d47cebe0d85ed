"""Answers under way: from the gate to the engine and back, with what is counted of them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from copy import copy

from jax_chunkattn.engine.misses import PromptUse
from jax_chunkattn.server.engine_thread import EngineThread
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.inbox import Inbox, News, Order, Ticket, tickets_of
from jax_chunkattn.server.limits import Gate
from jax_chunkattn.server.metrics import Metrics
from jax_chunkattn.server.tenants import Tenant


class Job(Inbox):
    """One request's answers.

    Attributes:
      tickets: of its prompts, when the engine has accepted them.
      arrived, first_token_at, last_token_at: by the monotonic clock.
      tokens: of each answer so far.
      reasons: why answers have ended, by answer.
    """

    def __init__(self, request_id: str, tenant: Tenant, arrived: float):
        super().__init__(request_id, tenant)
        self.tickets: list[Ticket] = []
        self.arrived = arrived
        self.first_token_at: dict[int, float] = {}
        self.last_token_at: dict[int, float] = {}
        self.tokens: dict[int, int] = defaultdict(int)
        self.reasons: dict[int, str] = {}

    @property
    def answers(self) -> int:
        """How many there are to be."""
        return sum(ticket.order.params.n for ticket in self.tickets)

    @property
    def finished(self) -> bool:
        return len(self.reasons) == self.answers

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ticket.order.prompt) for ticket in self.tickets)

    @property
    def completion_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def use(self) -> PromptUse:
        """Where the prompts' tokens came from, as far as they were admitted."""
        total = PromptUse()
        for ticket in self.tickets:
            total += (ticket.handles[0].prompt_use if ticket.handles else None) or PromptUse()
        return total

    def order_of(self, answer: int) -> Order:
        """What an answer is to."""
        return next(one.order for one in reversed(self.tickets) if one.first <= answer)


class Places:
    """Those of so many answers behind the gate, until a job has them or nobody wants them.

    Raises ApiError when there are too many, and changes nothing then.
    """

    def __init__(self, gate: Gate, tenant: Tenant, answers: int):
        gate.enter(tenant, answers)
        self.tenant = tenant
        self._gate = gate
        self._answers = answers

    def hand_over(self) -> Places:
        """The same places for who gives them back from now on."""
        taken = copy(self)
        self._answers = 0
        return taken

    def answered(self) -> None:
        """By other than a job: how fast that goes tells others how long they have to wait."""
        for _ in range(self._answers):
            self._gate.began()
            self._gate.leave(self.tenant)
        self._answers = 0

    def give_back(self) -> None:
        """Harmless when done twice."""
        self._gate.withdraw(self.tenant, self._answers)
        self._answers = 0


class Jobs:
    """Begins jobs, and counts what comes of them. For the event loop alone."""

    def __init__(self, gate: Gate, metrics: Metrics):
        self._gate = gate
        self._metrics = metrics

    async def begin(
        self,
        thread: EngineThread,
        request_id: str,
        places: Places,
        orders: Sequence[Order],
        arrived: float,
    ) -> Job:
        """Takes the places over; raises what `Engine.submit_samples` raises.

        Who waits may be cancelled at any time: what the engine accepts then ends at once.
        """
        job = Job(request_id, places.tenant, arrived)
        tickets, places = tickets_of(orders, job), places.hand_over()
        accepted = thread.submit(tickets)

        def decided(accepted: asyncio.Future[None]) -> None:
            if accepted.cancelled() or accepted.exception() is not None:
                places.give_back()  # else each answer leaves when it ends

        accepted.add_done_callback(decided)
        try:
            await asyncio.shield(accepted)
        except asyncio.CancelledError:
            thread.abort(tickets)
            raise
        job.tickets = tickets
        return job

    def deliver(self, ticket: Ticket, sample: int, news: News) -> None:
        """Takes what is new of a sample, for `EngineThread`."""
        job, answer, now = ticket.inbox, ticket.first + sample, time.monotonic()
        assert isinstance(job, Job)
        if not isinstance(news, ApiError) and news.tokens:
            if answer not in job.first_token_at:
                job.first_token_at[answer] = now
                self._gate.began()
                self._metrics.began(now - job.arrived)
            job.last_token_at[answer] = now
            job.tokens[answer] += len(news.tokens)
            self._metrics.chose(len(news.tokens))
        reason = "error" if isinstance(news, ApiError) else news.finish_reason
        if reason is not None:
            self._end(job, answer, reason, now)
        job.put(answer, news)

    def _end(self, job: Job, answer: int, reason: str, now: float) -> None:
        job.reasons[answer] = reason
        if answer not in job.first_token_at:
            self._gate.began()
        self._gate.leave(job.tenant)
        first = job.first_token_at.get(answer, now)
        after_first = job.last_token_at.get(answer, now) - first
        self._metrics.ended(reason, now - job.arrived, after_first, job.tokens[answer])
