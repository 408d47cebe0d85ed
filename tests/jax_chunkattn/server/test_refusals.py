"""What cannot be served is refused by name, in OpenAI's shape, and changes nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from jax_chunkattn.server.limits import Limits
from tests.jax_chunkattn.server.endpoints import MODEL, Running, running

CHAT = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHATS, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"

# Path, fields, the field that is named, and a part of the message.
REFUSED: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "best_of": (COMPLETIONS, {"best_of": 2}, "best_of", "not supported: ask for n"),
    "suffix": (COMPLETIONS, {"suffix": "x"}, "suffix", "not supported"),
    "unknown": (COMPLETIONS, {"colour": "red"}, "colour", "colour is not supported"),
    "text-for-number": (COMPLETIONS, {"max_tokens": "7"}, "max_tokens", "valid integer"),
    "float-for-integer": (COMPLETIONS, {"n": 1.5}, "n", "valid integer"),
    "bool-for-integer": (COMPLETIONS, {"n": True}, "n", "valid integer"),
    "huge": (COMPLETIONS, {"max_tokens": 10**30}, "max_tokens", "less than or equal"),
    "negative": (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "greater than or equal"),
    "nothing": (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "max_tokens 0 is for echo"),
    "empty-prompt": (COMPLETIONS, {"prompt": []}, "prompt", "prompt must be text"),
    "empty-text": (COMPLETIONS, {"prompt": ""}, None, "the prompt is empty"),
    "mixed-prompt": (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "prompt must be text"),
    "token": (COMPLETIONS, {"prompt": [256]}, None, "token id 256 at position 0"),
    "too-long": (COMPLETIONS, {"prompt": [1] * 2100}, None, "1024 positions"),
    "answer-too-long": (COMPLETIONS, {"max_tokens": 1021}, None, "asks for 1021 more"),
    "many-samples": (COMPLETIONS, {"n": 65}, "n", "this server takes at most 64"),
    "many-answers": (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 64}, "n", "192 answers"),
    "temperature": (COMPLETIONS, {"temperature": -1}, "temperature", "greater than or equal"),
    "top_p": (COMPLETIONS, {"top_p": 0}, "top_p", "greater than 0"),
    "bias-key": (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
    "bias-token": (COMPLETIONS, {"logit_bias": {"999": 1}}, None, "names token 999"),
    "stops": (COMPLETIONS, {"stop": ["x"] * 65}, None, "65 stop strings"),
    "stop-empty": (COMPLETIONS, {"stop": ""}, None, "strings that are not empty"),
    "logprobs": (COMPLETIONS, {"logprobs": 21}, "logprobs", "less than or equal to 20"),
    "options": (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "for"),
    "model": (COMPLETIONS, {"model": "gpt-4"}, "model", "there is no model 'gpt-4'"),
    "functions": (CHATS, {"functions": []}, "functions", "tools have taken their place"),
    "role": (CHATS, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "input"),
    "image": (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages.0.content",
        "a list of parts of the type text",
    ),
    "no-messages": (CHATS, {"messages": []}, "messages", "at least 1 item"),
    "json-mode": (CHATS, {"response_format": {"type": "json_object"}}, "response_format.type", ""),
    "tool-choice": (CHATS, {"tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
    "serial-tools": (CHATS, {"parallel_tool_calls": False}, "parallel_tool_calls", "True"),
    "stored": (CHATS, {"store": True}, "store", "False"),
    "top_logprobs": (CHATS, {"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    "two-limits": (CHATS, {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "one of"),
    "variables": (CHATS, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", ""),
    "variable": (CHATS, {"chat_template_kwargs": {"colour": 1}}, "messages", "colour"),
    "score-nothing": (SCORE, {"continuations": []}, "continuations", "at least 1 item"),
    "score-empty": (SCORE, {"continuations": [""]}, None, "is empty"),
    "score-long": (SCORE, {"continuations": [[1] * 2100]}, None, "1024 positions"),
    "score-much": (SCORE, {"continuations": [[1] * 800] * 4}, None, "takes at most 3000"),
}
NEEDED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hello"},
    CHATS: {"messages": CHAT},
    SCORE: {"prefix": "hello", "continuations": ["a"]},
}


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """An endpoint of narrow limits, at which nothing has happened when the tests are over."""
    with running(limits=Limits(body_bytes=100_000, body_seconds=1, score_tokens=3000)) as found:
        before = found.engine.stats
        yield found
        after = found.engine.stats
        assert (after.submitted, after.failed, after.calls) == (before.submitted, 0, before.calls)


def test_all_are_refused_for_what_they_add(tiny: Running):
    """Each is served without it: so it is refused for that alone."""
    for path, fields in NEEDED.items():
        more = {"max_tokens": 1} if path != SCORE else {}
        assert tiny.post(path, {"model": MODEL, **fields, **more}).status == 200


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(strict: Running, name: str):
    path, fields, param, part = REFUSED[name]
    body = {"model": MODEL, **NEEDED[path], **fields}
    reply = strict.post(path, body)
    assert reply.status == (404 if name == "model" else 400), reply.body
    error = reply.value["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert part in error["message"]
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"text"', "object"),
        (b'{"model": "tiny", "prompt": "\xff"}', "no JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "no JSON"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "no JSON"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 6000 + b"}", ""),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', ""),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', ""),
    ],
    ids=["empty", "open", "list", "null", "string", "bytes", "surrogate", "deep", "digits", "nan",
         "infinite"],
)  # fmt: skip
def test_what_is_no_request_is_refused(strict: Running, body: bytes, part: str):
    reply = strict.post(COMPLETIONS, body)
    assert reply.status == 400
    assert part in reply.value["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", COMPLETIONS, 405),
        ("POST", "/health", 405),
        ("DELETE", "/", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/completions/", 404),
    ],
)
def test_paths_and_methods_that_are_not_there(strict: Running, method, path, status):
    reply = strict.send(method, path, None, None)
    assert (reply.status, reply.value["error"]["param"]) == (
        status, "model" if path.endswith("none") else None,
    )  # fmt: skip


def test_a_page_of_another_site_cannot_ask(strict: Running):
    """It may send other types unasked, and call this machine by a name of its own."""
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = strict.post(COMPLETIONS, body, **{"Content-Type": kind})
        assert (reply.status, "Content-Type must be" in reply.body.decode()) == (415, True)
    reply = strict.get("/v1/models", Host="evil.example:8000")
    assert (reply.status, "is not called" in reply.body.decode()) == (421, True)
    for host in ("localhost", "127.0.0.1:80", "[::1]:8000"):
        assert strict.get("/health", Host=host).status == 200


def test_a_body_has_a_size_and_a_time(strict: Running):
    reply = strict.post(COMPLETIONS, b" " * 100_001)
    assert (reply.status, "larger than 100000 bytes" in reply.body.decode()) == (413, True)
    with socket.create_connection(strict.address, timeout=60) as chunked:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked.sendall(head.encode() + b"fffff\r\n" + b" " * 200_000)
        assert chunked.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(strict.address, timeout=60) as slow:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_a_request_has_the_name_that_its_client_gave_if_it_is_one(strict: Running):
    assert strict.get("/health", **{"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("two words", "x" * 65, "a\tb"):
        given = strict.get("/health", **{"X-Request-ID": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32
