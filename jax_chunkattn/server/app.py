"""The application: an endpoint's routes, and what holds for all of them.

`make_app` gives an ASGI application that any server runs; `serving.serve` runs it in uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Collection
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_chunkattn.server.endpoint import Endpoint
from jax_chunkattn.server.errors import ApiError, as_api_error
from jax_chunkattn.server.routes import CALL, Call, Routes

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CLIENT_LEFT = 499  # nobody reads it: of logs alone
QUIET = ("/health", "/ready", "/metrics", "/tree", "/")
"""Paths that are asked for all the time: what they say is not logged, but refusals."""

_LOG = logging.getLogger("jax_chunkattn.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)


def make_app(endpoint: Endpoint, *, hosts: Collection[str] | None = LOOPBACK) -> ASGIApp:
    """The application of one endpoint, which starts and stops it.

    Args:
      hosts: names by which clients may call it; None allows all. Else a page of another site could
        have a browser call it by a name of that site's own, which leads here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await endpoint.start()
        try:
            yield
        finally:
            await endpoint.stop()

    router = Router(Routes(endpoint).all(), redirect_slashes=False, lifespan=lifespan)
    return _Outside(router, endpoint, hosts)


class _Outside:
    """Names each request, answers what the routes raise, and logs it."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint, hosts: Collection[str] | None):
        self._app = app
        self._endpoint = endpoint
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1000})
        scope["app"] = self  # so that the router raises what it does not find
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        call = Call(_named(headers.get(b"x-request-id")), time.monotonic())
        scope[CALL] = call
        status: int | None = None

        async def give(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", call.id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        error: ApiError | None = None
        try:
            self._check_host(headers.get(b"host", ""))
            await self._app(scope, receive, give)
        except ClientDisconnect:
            status = status or CLIENT_LEFT
        except asyncio.CancelledError:
            if not self._endpoint.draining:
                raise
            status = status or CLIENT_LEFT  # the server ends, and its client has been left
        except HTTPException as raised:
            error = ApiError(raised.status_code, raised.detail, headers=raised.headers)
        except Exception as raised:
            error = as_api_error(raised)
            if error.status >= 500 and not isinstance(raised, ApiError):
                _LOG.error("a request failed", exc_info=raised, extra={"fields": {"id": call.id}})
        if error is not None and status is None:
            await error.response()(scope, receive, give)
        self._tell(scope, call, status or CLIENT_LEFT, error)

    def _check_host(self, host: str) -> None:
        if self._hosts is None:
            return
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in self._hosts:
            raise ApiError(421, f"this server is not called {host!r:.80}")

    def _tell(self, scope: Scope, call: Call, status: int, error: ApiError | None) -> None:
        if scope["path"] in QUIET and (status < 400 or status == 503):
            return
        if error is not None:
            self._endpoint.metrics.refused(error.status)
        fields = {
            "event": "request",
            "id": call.id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(time.monotonic() - call.arrived, 6),
            **call.fields,
        }
        if error is not None:
            fields["code"], fields["param"] = error.code, error.param
        _LOG.info("request", extra={"fields": fields})


def _named(given: str | None) -> str:
    """The client's own name for a request, if it is one, or a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
