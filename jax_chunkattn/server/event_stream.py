"""Server-sent events: answers in pieces, for as long as the client reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jax_chunkattn.server.bodies import watching
from jax_chunkattn.server.errors import json_bytes

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One event, whose data is JSON."""
    return b"data: %s\n\n" % json_bytes(value)


class EventStream(Response):
    """Sends pieces as they come, until they end or the client goes.

    Args:
      pieces: of the body.
      on_leave: called when the client has gone; then the pieces come to an end.
      on_end: called at the end, whatever it was.
      stalled_seconds: that a client may take nothing in.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        *,
        on_leave: Callable[[], None],
        on_end: Callable[[], None],
        stalled_seconds: float,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._on_leave = on_leave
        self._on_end = on_end
        self._stalled = stalled_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def give(message: Message) -> None:
            async with asyncio.timeout(self._stalled):
                await send(message)

        try:
            async with watching(receive, self._on_leave):
                start = {"status": self.status_code, "headers": self.raw_headers}
                await give({"type": "http.response.start", **start})
                async for piece in self._pieces:
                    await give({"type": "http.response.body", "body": piece, "more_body": True})
                await give({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, TimeoutError):
            self._on_leave()
        finally:
            self._on_end()
