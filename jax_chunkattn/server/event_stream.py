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
        patience = _Patience(send, self._stalled)
        give = patience.give
        try:
            async with watching(receive, self._on_leave):
                start = {"status": self.status_code, "headers": self.raw_headers}
                await give({"type": "http.response.start", **start})
                async for piece in self._pieces:
                    await give({"type": "http.response.body", "body": piece, "more_body": True})
                await give({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            self._on_leave()
        except asyncio.CancelledError:
            self._on_leave()
            if not patience.is_over:
                raise
            patience.task.uncancel()
        finally:
            patience.close()
            self._on_end()


class _Patience:
    """Sends for one task, which it cancels when a message has not been taken in for long.

    One timer for all messages: to start and stop one for each takes a tenth of what a piece costs.

    Attributes:
      task: that sends.
      is_over: whether it has been cancelled for that.
    """

    def __init__(self, send: Send, seconds: float):
        self.is_over = False
        self._send = send
        self._seconds = seconds
        task = asyncio.current_task()
        assert task is not None, "outside a task"
        self.task = task
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer = self._loop.call_later(seconds, self._look)

    async def give(self, message: Message) -> None:
        self._since = self._loop.time()
        await self._send(message)
        self._since = None

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        """Cancels the task, or looks again when it may be time."""
        now = self._loop.time()
        since = now if self._since is None else self._since
        if now - since < self._seconds:
            self._timer = self._loop.call_at(since + self._seconds, self._look)
        else:
            self.is_over = True
            self.task.cancel()
