"""The least that a client of a stream needs, so that measuring takes little of what is measured."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from experiments.harness.errors import UserError

LONGEST_LINE = 1 << 24


class Refused(Exception):
    """An answer that is none: its status, and the beginning of what it says."""


@dataclass
class Streamed:
    """One answer: seconds since it was asked for, by the monotonic clock.

    Attributes:
      began: when it was asked for.
      tokens: their ids, or as many zeros where the endpoint does not tell them.
      first, last: when the first and the last token came.
      prompt_tokens, cached_tokens: as the endpoint counts them; None where it does not.
      finish_reason: None when the stream has no end.
    """

    began: float
    tokens: list[int] = field(default_factory=list)
    first: float | None = None
    last: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None


class Client:
    """Asks one endpoint, over connections that are used again.

    Args:
      url: up to and with `/v1`.
      key: sent with each request; None for none.
    """

    def __init__(self, url: str, key: str | None = None):
        self._url: SplitResult = urlsplit(url.rstrip("/"))
        self._key = key
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def models(self) -> list[str]:
        """Names that the endpoint has. Raises UserError when it cannot be asked."""
        try:
            lines = [line async for line in self._ask("GET", "/models", None)]
            return [model["id"] for model in json.loads(b"".join(lines))["data"]]
        except (OSError, Refused, ValueError, LookupError, TypeError) as error:
            raise UserError(f"--url {self._url.geturl()} cannot be asked: {error}") from error

    async def complete(self, model: str, prompt: Sequence[int], max_tokens: int) -> Streamed:
        """The likeliest tokens behind a prompt, as they come.

        Raises Refused, and OSError when the connection is lost.
        """
        asked = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        answer = Streamed(time.monotonic())
        async for line in self._ask("POST", "/completions", asked):
            if line.startswith(b"data: {"):
                _take(answer, json.loads(line[6:]))
        return answer

    async def close(self) -> None:
        for _, writer in self._idle:
            await _closed(writer)
        self._idle.clear()

    async def _ask(
        self, method: str, path: str, value: Mapping[str, Any] | None
    ) -> AsyncIterator[bytes]:
        """Lines of the answer's body; raises Refused when its status is not 200."""
        body = b"" if value is None else json.dumps(value).encode()
        connection = await self._connection()
        reader, writer = connection
        whole = False
        try:
            writer.write(self._head(method, path, len(body)) + body)
            await writer.drain()
            status, headers = await _read_head(reader)
            lines = _lines(_body(reader, headers))
            if status != 200:
                said = b"".join([line async for line in lines])
                raise Refused(f"{status}: {said[:200].decode(errors='replace')}")
            async for line in lines:
                yield line
            whole = headers.get("connection") != "close"
        finally:
            if whole:
                self._idle.append(connection)
            else:
                await _closed(writer)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
        secure = self._url.scheme == "https"
        return await asyncio.open_connection(
            self._url.hostname,
            self._url.port or (443 if secure else 80),
            ssl=ssl.create_default_context() if secure else None,
            limit=LONGEST_LINE,
        )

    def _head(self, method: str, path: str, length: int) -> bytes:
        lines = [
            f"{method} {self._url.path}{path} HTTP/1.1",
            f"Host: {self._url.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
        ]
        if self._key is not None:
            lines.append(f"Authorization: Bearer {self._key}")
        return "\r\n".join([*lines, "", ""]).encode()


def _take(answer: Streamed, piece: Mapping[str, Any]) -> None:
    """Adds what an event of the stream says."""
    if "error" in piece:
        raise Refused(str(piece["error"])[:200])
    for choice in piece["choices"]:
        tokens = choice.get("token_ids") or ([0] if choice["text"] else [])
        if tokens:
            answer.last = time.monotonic()
            answer.first = answer.first or answer.last
            answer.tokens += tokens
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    if usage := piece.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens")


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in headers}


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Its parts as they come."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    held = b""
    async for part in parts:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            yield line
    if held:
        yield held
