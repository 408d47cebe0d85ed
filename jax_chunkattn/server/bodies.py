"""Reading what a client sends, within bounds, and noticing when it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.limits import Limits
from jax_chunkattn.server.schemas import Strict, explain

JSON = "application/json"

Schema = TypeVar("Schema", bound=Strict)


async def read_as(schema: type[Schema], request: Request, limits: Limits) -> Schema:
    """The request's body. Raises ApiError for what is not of this schema, or is too much, and
    ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:  # a page of another site may send anything else unasked
        raise ApiError(415, f"Content-Type must be {JSON}, got {kind!r:.60}")
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {limits.body_seconds:g} s") from None
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        message, param = explain(error.errors(include_url=False, include_context=False)[0])
        raise ApiError(400, message, param=param) from None
    except (ValueError, RecursionError) as error:  # of numbers that no Python makes
        raise ApiError(400, f"the body is no JSON that can be read: {error}") from None


async def _read(request: Request, most: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {most} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


@asynccontextmanager
async def watching(receive: Receive, on_leave: Callable[[], None]) -> AsyncIterator[None]:
    """While the block runs, `on_leave` is called if the client goes."""

    async def watch() -> None:
        with suppress(ClientDisconnect):
            while (await receive())["type"] != "http.disconnect":
                pass
        on_leave()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
