"""Answers under way: from the gate to the engine and back, with what is counted of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from jax_chunkattn.engine.misses import PromptUse
from jax_chunkattn.server.engine_thread import EngineThread
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.inbox import Inbox, News, Order, Ticket
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


class Jobs:
    """Begins jobs, and counts what comes of them. For the event loop alone."""

    def __init__(self, gate: Gate, metrics: Metrics):
        self._gate = gate
        self._metrics = metrics

    async def begin(
        self,
        thread: EngineThread,
        request_id: str,
        tenant: Tenant,
        orders: Sequence[Order],
        arrived: float,
    ) -> Job:
        """Raises ApiError when there are too many, and what `Engine.submit_samples` raises."""
        job = Job(request_id, tenant, arrived)
        answers = sum(order.params.n for order in orders)
        self._gate.enter(tenant, answers)
        try:
            job.tickets = await thread.submit(orders, job)
        except Exception:
            for _ in range(answers):
                self._gate.began()
                self._gate.leave(tenant)
            raise
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
