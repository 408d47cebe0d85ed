"""One engine that is served: its thread, who may use it, and how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.server.answers import TokenTexts
from jax_chunkattn.server.engine_thread import EngineThread
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.inbox import Order
from jax_chunkattn.server.jobs import Job, Jobs, Places
from jax_chunkattn.server.limits import Gate, Limits
from jax_chunkattn.server.metrics import Metrics
from jax_chunkattn.server.orders import Served
from jax_chunkattn.server.scores import Scorer
from jax_chunkattn.server.tenants import EVERYBODY, Keys, Tenant
from jax_chunkattn.server.tree_watch import TreeWatch

_LOG = logging.getLogger("jax_chunkattn.server")


class Endpoint:
    """What the routes use. All but the engine's own thread happens in one event loop.

    Args:
      engine: made, and not closed here.
      served: what clients are told of its model.
      keys: who may use it; None lets everybody who reaches it.
      limits: what may be asked for.
      warm_up: called once with the engine, in its thread, before `ready`; None for nothing.
      log_prompts: requests are logged as they came.
    """

    def __init__(
        self,
        engine: Engine,
        served: Served,
        *,
        keys: Keys | None = None,
        limits: Limits = Limits(),
        warm_up: Callable[[Engine], Any] | None = None,
        log_prompts: bool = False,
    ):
        self.engine = engine
        self.served = served
        self.limits = limits
        self.log_prompts = log_prompts
        self.texts = TokenTexts(served.tokenizer)
        self.metrics = Metrics(served.name)
        self.gate = Gate(limits)
        self.scorer = Scorer(engine)
        self.ready = False
        self.draining = False
        self._keys = keys
        self._warm_up = warm_up
        self._jobs = Jobs(self.gate, self.metrics)
        self._thread: EngineThread | None = None
        self._watch: TreeWatch | None = None
        self._warming: asyncio.Task[None] | None = None

    # Starting and stopping.

    async def start(self) -> None:
        """Starts the engine's thread, and warms it up beside what else happens."""
        self._thread = EngineThread(self.engine, asyncio.get_running_loop(), self._jobs.deliver)
        self._watch = TreeWatch(self._thread)
        self._thread.start()
        self._warming = asyncio.create_task(self._become_ready())

    async def _become_ready(self) -> None:
        began = time.monotonic()
        if self._warm_up is not None:
            try:
                await self.thread.call(self._warm_up)
            except Exception:
                _LOG.exception("the engine could not be warmed up")
                return
        self.ready = True
        fields = {"event": "ready", "seconds": round(time.monotonic() - began, 3)}
        _LOG.info("ready", extra={"fields": fields})

    def drain(self) -> None:
        """Begins nothing new; what runs goes on."""
        self.ready, self.draining = False, True

    async def finish(self, seconds: float) -> None:
        """Waits so long for what runs, then ends it: its clients are told that it is not whole."""
        self.drain()
        until = time.monotonic() + seconds
        while self.gate.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.gate.open:
            _LOG.warning("ends %d answers that are not finished", self.gate.open)
            await self.thread.abort_all()

    async def stop(self) -> None:
        """Ends all that is left, and the engine's thread. The engine stays open."""
        self.drain()
        if self._warming is not None:
            self._warming.cancel()
        self.scorer.close()
        if self._thread is not None:
            await self._thread.stop()

    @property
    def thread(self) -> EngineThread:
        assert self._thread is not None, "not started"
        return self._thread

    @property
    def watch(self) -> TreeWatch:
        assert self._watch is not None, "not started"
        return self._watch

    @property
    def healthy(self) -> bool:
        return self._thread is not None and self._thread.alive

    # For the routes.

    def tenant_of(self, authorization: str | None) -> Tenant:
        """Raises ApiError for who may not use this server."""
        return EVERYBODY if self._keys is None else self._keys.tenant_of(authorization)

    def observer_of(self, authorization: str | None) -> Tenant:
        """Raises ApiError for who may not see what all tenants do."""
        tenant = self.tenant_of(authorization)
        if not tenant.observes:
            raise ApiError(403, "this key may not see what others do: it is no observer's")
        return tenant

    def require_open(self) -> None:
        """Raises ApiError when nothing new is begun."""
        if self.draining:
            raise ApiError(503, "the server stops", headers={"Retry-After": "5"})
        if not self.healthy:
            raise ApiError(503, "the engine has stopped: nothing is served any longer")

    @contextmanager
    def places(self, tenant: Tenant, answers: int) -> Iterator[Places]:
        """So many answers have come in until the block ends, or a job begins that has them.

        Taken before anything is tokenized. Raises ApiError when they are too many, or when nothing
        new is begun.
        """
        self.require_open()
        places = Places(self.gate, tenant, answers)
        try:
            yield places
        finally:
            places.give_back()

    async def begin(
        self, request_id: str, places: Places, orders: Sequence[Order], arrived: float
    ) -> Job:
        """Raises what `Jobs.begin` raises, and ApiError when nothing new is begun."""
        self.require_open()
        return await self._jobs.begin(self.thread, request_id, places, orders, arrived)

    def leave(self, job: Job) -> None:
        """Nobody reads it any more: what runs of it ends at the next turn."""
        job.leave()
        if not job.finished:
            self.thread.abort(job.tickets)
