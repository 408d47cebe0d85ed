"""A thousand requests that are wrong get an answer that says so, and change nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from jax_chunkattn.server.limits import Limits
from jax_chunkattn.server.schemas import ChatRequest, CompletionRequest, ScoreRequest
from tests.jax_chunkattn.server.endpoints import MODEL, Running, running

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": MODEL, "prompt": "a", "max_tokens": 2, "n": 1, "seed": 1, "stop": ["x"],
        "temperature": 1.0, "top_p": 0.5, "logprobs": 1, "logit_bias": {"1": 2.0}, "echo": False,
        "stream": False, "presence_penalty": 0.5, "cache_salt": "x", "stop_token_ids": [1],
    },
    "/v1/chat/completions": {
        "model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "n": 1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "logprobs": True, "top_logprobs": 1, "stream": True, "response_format": {"type": "text"},
        "stream_options": {"include_usage": True}, "tool_choice": "auto",
    },
    "/v1/score": {"model": MODEL, "prefix": "a", "continuations": ["b", [1]], "top_logprobs": 1},
}  # fmt: skip
WRONG: tuple[Any, ...] = (
    10**40, -(10**40), 1e308, -1, 2**63, {}, {"a": {"b": []}}, [[[[[]]]]], [None], [{}], "\0",
    [1e9], [True], "x" * 20_000, {"\ud800": 1}, [10**20] * 50,
)  # fmt: skip


@pytest.fixture(scope="module")
def untouched() -> Iterator[Running]:
    with running(limits=Limits(body_bytes=50_000, body_seconds=2)) as found:
        before = found.engine.stats
        yield found
        after = found.engine.stats
        assert (after.submitted, after.calls, after.failed) == (before.submitted, before.calls, 0)
        assert found.complete("abc", max_tokens=2).status == 200


def deep(random: np.random.Generator) -> bytes:
    depth = int(random.integers(200, 9000))
    opening, closing = [(b"[", b"]"), (b'{"a":', b"1}")][random.integers(2)]
    return b'{"model": "tiny", "prompt": ' + opening * depth + closing * depth + b"}"


def wrong_body(path: str, random: np.random.Generator) -> bytes:
    """One that is wrong in one of the ways there are."""
    fields = json.loads(json.dumps(GOOD[path]))
    how = random.integers(8)
    name = str(random.choice([*fields]))
    if how <= 2:
        fields[name] = WRONG[random.integers(len(WRONG))]
        if name in ("prompt", "prefix", "cache_salt", "stop") and isinstance(fields[name], str):
            fields[name] = {"a": 1}  # for these texts are right
        if name in ("seed", "temperature") or fields[name] in ({}, -1):
            fields[name] = [fields[name]]
    elif how == 3:
        fields[f"x{name}"] = 1
    elif how == 4:
        del fields["model"]
    elif how == 5:
        return deep(random)
    body = json.dumps(fields).encode()
    if how == 6:
        at = int(random.integers(2, len(body) - 1))
        return body[:at] + b"\xff" + bytes(random.integers(128, 256, 2, np.uint8)) + body[at:]
    if how == 7:
        return body[: random.integers(1, len(body) - 1)]
    return body


@pytest.mark.parametrize(
    ("schema", "field", "one"),
    [
        (CompletionRequest, "prompt", ""),
        (CompletionRequest, "prompt", [""]),
        (CompletionRequest, "stop", 1),
        (ChatRequest, "messages", {}),
        (ScoreRequest, "continuations", {}),
    ],
)
def test_a_list_of_wrong_things_is_one_error(schema, field: str, one: object):
    """Else a body within the limit is a million of them, and nobody else is answered meanwhile."""
    body = json.dumps({"model": "tiny", field: [one] * 100_000})
    with pytest.raises(ValidationError) as raised:
        schema.model_validate_json(body)
    assert raised.value.error_count() < 12


@pytest.mark.parametrize("path", GOOD)
def test_what_they_are_made_from_is_right(tiny: Running, path: str):
    assert tiny.post(path, GOOD[path]).status == 200


@pytest.mark.parametrize(
    "count", [150, pytest.param(1000, marks=pytest.mark.slow)], ids=["short", "slow"]
)
def test_wrong_bodies_are_refused(untouched: Running, count: int):
    random = np.random.default_rng(count)
    connection = untouched.connect()
    for number in range(count):
        path = str(random.choice([*GOOD]))
        body = wrong_body(path, random)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        assert 400 <= answer.status < 500, (number, path, body[:300], said)
        assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
        assert len(said) < 2000
    connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        b"Content-Length: 8\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["tls", "no-target", "length", "two-lengths", "chunks", "target", "headers",
         "bytes", "http2"],
)  # fmt: skip
def test_what_is_no_http_is_not_answered_or_refused(untouched: Running, sent: bytes):
    with socket.create_connection(untouched.address, timeout=30) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(100)
        except OSError:  # it was closed before all was sent
            said = b""
    assert said == b"" or said.startswith(b"HTTP/1.1 4"), said
    assert untouched.get("/health").status == 200


@pytest.mark.parametrize("cut", range(0, 200, 20))
def test_a_client_that_ends_its_half_too_early_changes_nothing(untouched: Running, cut: int):
    body = json.dumps(GOOD["/v1/completions"]).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(untouched.address, timeout=30) as connection:
        connection.sendall(sent[: len(sent) - 1 - cut])
        connection.shutdown(socket.SHUT_WR)
        said = connection.recv(100)
    assert said == b"" or said.startswith(b"HTTP/1.1 4"), said


@pytest.mark.slow
def test_schemathesis_finds_no_error_of_the_server(tiny: Running):
    """Requests made up from the server's own description, right and wrong ones."""
    pytest.importorskip("schemathesis", reason="needs the extra clients")
    command = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [
            command, "run", f"{tiny.url}/openapi.json", "--url", tiny.url, "--max-examples", "60",
            "--seed", "1", "--checks", "not_a_server_error,response_schema_conformance,"
            "content_type_conformance,status_code_conformance,negative_data_rejection",
            "--request-timeout", "60", "--exclude-path", "/ready", "--no-color",
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert tiny.engine.stats.failed == 0
