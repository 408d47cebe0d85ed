"""What is answered, by path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jax_chunkattn.server.answers import Head, usage_of_job, whole_answers
from jax_chunkattn.server.bodies import JSON, read_as, watching
from jax_chunkattn.server.chats import Chats
from jax_chunkattn.server.completions import Completions, Echo, echoes_of
from jax_chunkattn.server.endpoint import Endpoint
from jax_chunkattn.server.errors import ApiError, json_bytes
from jax_chunkattn.server.event_stream import EventStream
from jax_chunkattn.server.inbox import Inbox, Order
from jax_chunkattn.server.jobs import Job
from jax_chunkattn.server.metrics import CONTENT_TYPE
from jax_chunkattn.server.openapi import description
from jax_chunkattn.server.orders import (
    chat_order,
    chat_wanted,
    completion_orders,
    completion_wanted,
    require_model,
)
from jax_chunkattn.server.schemas import ChatRequest, CompletionRequest, ScoreRequest, Strict
from jax_chunkattn.server.scores import check_scored, score
from jax_chunkattn.server.tenants import Tenant

CALL = "jax_chunkattn.call"
"""Where an ASGI scope has its `Call`."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Call:
    """One HTTP request.

    Attributes:
      id: that answers and logs name it by.
      arrived: by the monotonic clock.
      fields: what is logged of it.
    """

    id: str
    arrived: float
    fields: dict[str, Any] = field(default_factory=dict)


def call_of(request: Request) -> Call:
    return request.scope[CALL]


class Routes:
    """The handlers of one endpoint; what they raise, the application answers."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._page = (
            resources.files("jax_chunkattn.server").joinpath("page.html").read_text("utf-8")
        )

    def all(self) -> list[Route]:
        post, get = ["POST"], ["GET"]
        return [
            Route("/", self.page, methods=get),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/chat/completions", self.chats, methods=post),
            Route("/v1/score", self.scores, methods=post),
            Route("/tree", self.tree, methods=get),
            Route("/metrics", self.metrics, methods=get),
            Route("/health", self.health, methods=get),
            Route("/ready", self.ready, methods=get),
            Route("/openapi.json", self.openapi, methods=get),
        ]

    # Answers.

    async def completions(self, request: Request) -> Response:
        endpoint, call = self._endpoint, call_of(request)
        tenant = self._tenant(request)
        asked = await self._body(CompletionRequest, request)
        served, limits = endpoint.served, endpoint.limits
        wanted = completion_wanted(asked, served, limits)
        writer = Completions(asked, Head.of("cmpl", "text_completion", served.name), endpoint.texts)
        with endpoint.places(tenant, wanted.answers) as places:
            orders = await completion_orders(asked, wanted, served, limits, tenant)
            if asked.echo:
                writer.echoes = await self._echoes(request, asked, orders, tenant)
            if asked.max_tokens == 0:
                places.answered()
                return _json(writer.only_echoes(orders))
            job = await endpoint.begin(call.id, places, orders, call.arrived)
        return await self._answer(request, job, writer, bool(asked.stream))

    async def _echoes(
        self,
        request: Request,
        asked: CompletionRequest,
        orders: Sequence[Order],
        tenant: Tenant,
    ) -> list[Echo]:
        endpoint = self._endpoint
        for order in orders:
            endpoint.engine.check_request(order.prompt, order.params, salt=order.salt)
        if asked.logprobs is not None:
            check_scored(sum(len(order.prompt) for order in orders), endpoint.limits)
        inbox = Inbox(call_of(request).id, tenant)
        async with watching(request.receive, inbox.leave):
            echoes = await echoes_of(asked, orders, endpoint.scorer, endpoint.texts, inbox)
        if inbox.gone:
            raise ClientDisconnect
        return echoes

    async def chats(self, request: Request) -> Response:
        endpoint, call = self._endpoint, call_of(request)
        tenant = self._tenant(request)
        asked = await self._body(ChatRequest, request)
        served, limits = endpoint.served, endpoint.limits
        wanted = chat_wanted(asked, served, limits)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        writer = Chats(asked, Head.of("chatcmpl", kind, served.name), endpoint.texts)
        with endpoint.places(tenant, wanted.answers) as places:
            order = await chat_order(asked, wanted, served, limits, tenant)
            job = await endpoint.begin(call.id, places, [order], call.arrived)
        return await self._answer(request, job, writer, bool(asked.stream))

    async def scores(self, request: Request) -> Response:
        endpoint = self._endpoint
        inbox = Inbox(call_of(request).id, self._tenant(request))
        asked = await self._body(ScoreRequest, request)
        require_model(asked.model, endpoint.served)
        with endpoint.places(inbox.tenant, 1) as places:
            async with watching(request.receive, inbox.leave):
                told = await score(
                    asked,
                    endpoint.scorer,
                    endpoint.served,
                    endpoint.limits,
                    inbox,
                    endpoint.texts,
                )
            places.answered()
        if inbox.gone:
            raise ClientDisconnect
        return _json(told)

    async def _answer(
        self, request: Request, job: Job, writer: Completions | Chats, streams: bool
    ) -> Response:
        endpoint, call = self._endpoint, call_of(request)

        def leave() -> None:
            endpoint.leave(job)

        def end() -> None:
            leave()
            call.fields |= fields_of(job)

        if streams:
            return EventStream(
                writer.pieces(job),
                on_leave=leave,
                on_end=end,
                stalled_seconds=endpoint.limits.stalled_seconds,
            )
        try:
            async with watching(request.receive, leave):
                answers = await whole_answers(job)
            if job.gone:
                raise ClientDisconnect
            return _json(writer.whole(job, answers))
        finally:
            end()

    # What there is, and how it is.

    async def models(self, request: Request) -> Response:
        self._tenant(request)
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._tenant(request)
        require_model(request.path_params["name"], self._endpoint.served)
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        served = self._endpoint.served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "jax_chunkattn",
            "max_model_len": served.most_tokens,
            "vocab_size": served.vocab_size,
        }

    async def tree(self, request: Request) -> Response:
        self._endpoint.observer_of(request.headers.get("authorization"))
        return _json(await self._endpoint.watch.now(), {"Cache-Control": "no-store"})

    async def metrics(self, request: Request) -> Response:
        self._endpoint.observer_of(request.headers.get("authorization"))
        stats = await self._endpoint.thread.call(lambda engine: engine.stats)
        return Response(self._endpoint.metrics.text(stats), headers={"Content-Type": CONTENT_TYPE})

    async def health(self, request: Request) -> Response:
        del request
        if not self._endpoint.healthy:
            raise ApiError(503, "the engine has stopped")
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        del request
        if not (self._endpoint.ready and self._endpoint.healthy):
            raise ApiError(503, "not ready: the engine is not warm yet, or the server stops")
        return _json({"status": "ready"})

    async def openapi(self, request: Request) -> Response:
        del request
        return _json(description(self._endpoint.served.name))

    async def page(self, request: Request) -> Response:
        del request
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_POLICY})

    # What they have in common.

    def _tenant(self, request: Request) -> Any:
        tenant = self._endpoint.tenant_of(request.headers.get("authorization"))
        if tenant.name:
            call_of(request).fields["tenant"] = tenant.name
        return tenant

    async def _body(self, schema: type[Any], request: Request) -> Any:
        self._endpoint.require_open()
        asked: Strict = await read_as(schema, request, self._endpoint.limits)
        if self._endpoint.log_prompts:
            call_of(request).fields["request"] = asked.model_dump(exclude_none=True)
        return asked


def fields_of(job: Job) -> dict[str, Any]:
    """What is logged of answers."""
    usage = usage_of_job(job)
    first = min(job.first_token_at.values(), default=None)
    return {
        "answers": job.answers,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        **usage["prompt_tokens_details"],
        "first_token_seconds": None if first is None else round(first - job.arrived, 6),
        "finish_reasons": [job.reasons.get(number, "left") for number in range(job.answers)],
    }


def _json(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), headers=headers, media_type=JSON)
