"""Endpoints that serve the toy model in this process, and the plainest client there is."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jax_chunkattn import Engine
from jax_chunkattn.server.endpoint import Endpoint
from jax_chunkattn.server.orders import Served
from jax_chunkattn.server.serving import Server, Serving
from tests.jax_chunkattn.engine.engines import BytePairs, make_engine
from tests.jax_chunkattn.toy import toy_model

MODEL = "tiny"
LONG = 600  # tokens of an answer that takes two hundred calls
SECONDS = 60  # that anything may take


def write_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    shout: bool = False,
) -> list[int]:
    """A template for the toy model: each message in a line, behind the tools."""
    lines = [f"tools {json.dumps(tools)}"] if tools else []
    for message in messages:
        if message["role"] == "tool" and "tool_call_id" not in message:
            raise ValueError("a tool's message needs a tool_call_id")
        lines.append(f"{message['role']}: {message.get('content') or ''}")
        lines += [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    text = "\n".join([*lines, "assistant: "])
    return list((text.upper() if shout else text).encode())


def until(condition: Callable[[], bool]) -> None:
    """Waits for it, but not for ever."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    """All of them as one."""
    return [one for each in lists for one in each]


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream that came to its end."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass
class Running:
    """An endpoint that listens."""

    url: str
    engine: Engine
    endpoint: Endpoint
    server: Server

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.partition("://")[2].split(":")
        return host, int(port)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=SECONDS)

    def get(self, path: str, key: str | None = None, **headers: str) -> Reply:
        return self.send("GET", path, None, key, **headers)

    def post(self, path: str, value: Any, key: str | None = None, **headers: str) -> Reply:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Type": "application/json", **headers}
        return self.send("POST", path, body, key, **headers)

    def send(
        self, method: str, path: str, body: bytes | None, key: str | None, **headers: str
    ) -> Reply:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def complete(self, prompt: Any, key: str | None = None, **fields: Any) -> Reply:
        """With the likeliest tokens, and their ids."""
        asked = {"model": MODEL, "prompt": prompt, "temperature": 0, "return_token_ids": True}
        return self.post("/v1/completions", asked | fields, key)

    def chat(self, messages: Any, **fields: Any) -> Reply:
        asked = {"model": MODEL, "messages": messages, "temperature": 0}
        return self.post("/v1/chat/completions", asked | fields)


def served_of(engine: Engine, **changes: Any) -> Served:
    chunks = engine.cache.num_chunks
    assert chunks is not None
    fields = {
        "name": MODEL,
        "max_positions": toy_model().max_positions,
        "pool_tokens": chunks * engine.cache.chunk_size,
        "vocab_size": 256,
        "tokenizer": BytePairs(),
        "chat": write_chat,
    }
    return Served(**fields | changes)


@contextmanager
def running(
    engine: Engine | None = None,
    *,
    serving: Serving = Serving(port=0, grace=5),
    served: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """An endpoint in a thread, which has stopped, and lost nothing, when the block ends."""
    engine = engine or make_engine(tokenizer=BytePairs())
    endpoint = Endpoint(engine, served_of(engine, **served or {}), **options)
    server = Server(endpoint, serving, keyed=options.get("keys") is not None)
    listening = threading.Event()
    urls: list[str] = []

    def listen(url: str) -> None:
        urls.append(url)
        listening.set()

    thread = threading.Thread(target=server.run_until_stopped, args=(listen,))
    thread.start()
    try:
        assert listening.wait(SECONDS)
        until(lambda: server.started)
        yield Running(urls[0], engine, endpoint, server)
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
    engine.check()
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.chunks_in_use) == (0, 0, 0)
    assert endpoint.gate.open == endpoint.gate.waiting == 0


@contextmanager
def held(found: Running) -> Iterator[None]:
    """The engine's thread waits, as in a long call, while the block runs."""
    go_on, holds = threading.Event(), threading.Event()

    def hold() -> None:
        holds.set()
        go_on.wait(SECONDS)

    found.endpoint.thread.later(hold)
    assert holds.wait(SECONDS)
    try:
        yield
    finally:
        go_on.set()


def opened(found: Running, **fields: Any) -> socket.socket:
    """A connection on which a long stream has been asked for."""
    asked = {"model": MODEL, "prompt": "a", "max_tokens": LONG, "stream": True, **fields}
    body = json.dumps(asked)
    connection = socket.create_connection(found.address, timeout=SECONDS)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection
