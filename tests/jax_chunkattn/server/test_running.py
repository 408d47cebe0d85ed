"""Limits, clients that go or do not read, the end of a server, and what it tells of itself."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jax_chunkattn import Engine, SamplingParams
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.inbox import Order
from jax_chunkattn.server.limits import Gate, Limits
from jax_chunkattn.server.log import Log
from jax_chunkattn.server.serving import Serving
from jax_chunkattn.server.tenants import EVERYBODY, Keys, Tenant
from jax_chunkattn.server.tls import TLSError
from tests.jax_chunkattn.engine.engines import BytePairs, make_engine
from tests.jax_chunkattn.server.endpoints import (
    LONG,
    MODEL,
    SECONDS,
    Running,
    held,
    opened,
    running,
    until,
)


def reset(connection: socket.socket) -> None:
    """Goes away as a client that is killed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def at_rest(found: Running) -> bool:
    stats = found.engine.stats
    return not (stats.running or stats.waiting or found.endpoint.gate.open)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["closed", "reset"])
def test_a_client_that_goes_ends_its_request_within_a_call(tiny: Running, streams: bool, leave):
    before = tiny.engine.stats
    connection = opened(tiny, stream=streams)
    until(lambda: tiny.engine.stats.running == 1)
    leave(connection)
    until(lambda: at_rest(tiny))
    after = tiny.engine.stats
    assert after.aborted == before.aborted + 1
    assert after.decode_tokens - before.decode_tokens < LONG - 1
    with held(tiny):
        connection = opened(tiny, stream=streams)
        until(lambda: tiny.endpoint.gate.open == 1)
        leave(connection)
        time.sleep(0.1)
        calls = tiny.engine.stats.calls
    until(lambda: at_rest(tiny))
    assert tiny.engine.stats.calls <= calls + 1


def test_all_samples_of_a_client_that_goes_end(tiny: Running):
    before = tiny.engine.stats.aborted
    connection = opened(tiny, n=3, prompt=["a", "b"])
    until(lambda: tiny.engine.stats.running == 6)
    connection.close()
    until(lambda: at_rest(tiny))
    assert tiny.engine.stats.aborted == before + 6


def test_a_client_that_reads_nothing_blocks_nobody(tiny: Running):
    with opened(tiny, n=4, logprobs=20, return_token_ids=True) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        until(lambda: tiny.engine.stats.running == 4)
        assert tiny.complete("b", max_tokens=20).status == 200
        until(lambda: at_rest(tiny))  # all of it is computed, and waits for who reads
        answer = http.client.HTTPResponse(lazy)
        answer.begin()
        *lines, done, _ = answer.read().split(b"\n\n")
        assert done == b"data: [DONE]"
        choices = [json.loads(line.removeprefix(b"data: "))["choices"][0] for line in lines]
    for index in range(4):
        pieces = [choice for choice in choices if choice["index"] == index]
        assert sum(len(piece["token_ids"]) for piece in pieces) == LONG
        assert pieces[-1]["finish_reason"] == "length"


@pytest.mark.slow
def test_a_client_that_reads_nothing_for_long_is_given_up():
    """The socket's buffers hold some of it, so that there must be much."""
    with running(limits=Limits(stalled_seconds=1)) as found:
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(found.address)
        prompt = [[at] for at in range(8)]
        asked = {"model": MODEL, "prompt": prompt, "n": 8, "max_tokens": LONG, "stream": True}
        body = json.dumps(asked | {"logprobs": 20}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        lazy.sendall(head + body)
        until(lambda: found.engine.stats.running > 0)
        until(lambda: at_rest(found))
        assert found.engine.stats.aborted > 0
        lazy.close()


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_again():
    with running(limits=Limits(queue=3)) as found, held(found):
        connections = [opened(found) for _ in range(3)]
        until(lambda: found.endpoint.gate.waiting == 3)
        reply = found.complete("b")
        assert (reply.status, reply.value["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert found.get("/health").status == 200
        for connection in connections:
            connection.close()


def test_who_is_told_to_come_again_has_nothing_tokenized():
    asked: list[str] = []

    class Counting(BytePairs):
        def encode(self, text: str) -> list[int]:
            asked.append(text)
            return super().encode(text)

    def chat(messages, *, tools):
        asked.append("chat")
        return [1]

    served = {"tokenizer": Counting(), "chat": chat}
    with running(served=served, limits=Limits(queue=1)) as found, held(found):
        connection = opened(found, prompt=[1])
        until(lambda: found.endpoint.gate.waiting == 1)
        score = {"model": MODEL, "prefix": "a", "continuations": ["b"]}
        for reply in (
            found.complete("a"),
            found.complete("a", echo=True, max_tokens=0),
            found.chat([{"role": "user", "content": "a"}]),
            found.post("/v1/score", score),
        ):
            assert (reply.status, reply.value["error"]["code"]) == (429, "queue_full")
        connection.close()
    assert asked == []


@pytest.mark.parametrize("prompt", [[1], [999]], ids=["accepted", "refused"])
def test_who_is_cancelled_while_the_engine_decides_keeps_no_place(tiny: Running, prompt):
    endpoint = tiny.endpoint
    before = tiny.engine.stats

    async def begin() -> None:
        with endpoint.places(EVERYBODY, 1) as places:
            order = Order(prompt, SamplingParams(LONG), "")
            await endpoint.begin("cancelled", places, [order], 0.0)

    with held(tiny):
        begun = asyncio.run_coroutine_threadsafe(begin(), endpoint.thread.loop)
        until(lambda: endpoint.gate.open == 1)
        begun.cancel()
        time.sleep(0.1)
        assert endpoint.gate.waiting == 1  # the engine may still accept it
    until(lambda: endpoint.gate.open == endpoint.gate.waiting == 0)
    assert tiny.engine.stats.decode_tokens - before.decode_tokens < LONG - 1


def test_a_key_has_so_many_streams_at_once_and_others_theirs():
    keys = Keys({"a" * 16: Tenant("ann"), "b" * 16: Tenant("ben")})
    with running(limits=Limits(streams=2), keys=keys) as found:
        with held(found):
            waiting = [
                threading.Thread(target=found.complete, args=("a", "a" * 16)) for _ in range(2)
            ]
            for thread in waiting:
                thread.start()
            until(lambda: found.endpoint.gate.open == 2)
            refused = found.complete("a", "a" * 16)
            assert (refused.status, refused.value["error"]["code"]) == (429, "rate_limit_exceeded")
            other = threading.Thread(target=found.complete, args=("a", "b" * 16))
            other.start()
            until(lambda: found.endpoint.gate.open == 3)
        for thread in (*waiting, other):
            thread.join()
        assert found.complete("a", "a" * 16).status == 200


def test_the_gate_counts_what_comes_and_goes():
    gate = Gate(Limits(queue=4, streams=6))
    gate.enter(EVERYBODY, 4)
    for _ in range(2):
        gate.began()
    gate.enter(EVERYBODY, 2)
    assert (gate.waiting, gate.open) == (4, 6)
    with pytest.raises(ApiError, match="the queue holds 4") as refused:
        gate.enter(EVERYBODY, 1)
    assert refused.value.headers["Retry-After"] == "1"
    gate.began()
    with pytest.raises(ApiError, match="this key has 6 answers under way"):
        gate.enter(EVERYBODY, 1)
    gate.enter(Tenant("other"), 1)
    assert (gate.waiting, gate.open) == (4, 7)


@pytest.mark.parametrize("field", ["queue", "body_bytes", "new_tokens", "body_seconds"])
def test_limits_that_let_nothing_through_are_refused(field: str):
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        Limits(**{field: 0})


def test_own_limits_of_tokens():
    with running(limits=Limits(prompt_tokens=4, new_tokens=3)) as found:
        assert "at most 4" in found.complete("abcde", max_tokens=3).body.decode()
        assert "at most 3" in found.complete("abcd", max_tokens=4).body.decode()
        usage = found.chat([{"role": "user", "content": ""}]).value
        assert "at most 4" in usage["error"]["message"]
        assert found.complete("abcd", max_tokens=3).status == 200


def test_the_end_waits_for_what_runs():
    with running() as found:
        connection = opened(found, return_token_ids=True)
        until(lambda: found.engine.stats.running == 1)
        found.server.stop()
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        lines = answer.read().decode().split("\n\n")
        connection.close()
    assert lines[-2] == "data: [DONE]"
    last = json.loads(lines[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_the_end_tells_who_is_cut_off(streams: bool):
    engine = make_engine(tokenizer=BytePairs())
    with running(engine, serving=Serving(port=0, grace=0.2)) as found:
        with held(found):
            connection = opened(found, stream=streams)
            until(lambda: found.endpoint.gate.open == 1)
            found.server.stop()
            until(lambda: found.endpoint.draining)
            time.sleep(0.5)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = answer.read().decode()
        connection.close()
        assert "the server stops: the answer is not complete" in body
        assert (answer.status, body.endswith("data: [DONE]\n\n")) == (
            (200, True) if streams else (503, False)
        )


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_to_be_stopped_twice_is_to_end_at_once_and_quietly(streams: bool, caplog):
    with running(serving=Serving(port=0, grace=600)) as found:
        connection = opened(found, stream=streams)
        until(lambda: found.engine.stats.running == 1)
        with held(found):
            waiting = opened(found, prompt="b", stream=streams)
            until(lambda: found.endpoint.gate.open == 2)
            for _ in range(2):
                found.server.stop()
            for one in (connection, waiting):
                with one, suppress(ConnectionResetError):
                    while one.recv(1 << 16):
                        pass
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_nothing_new_is_begun_at_the_end(tiny: Running):
    tiny.endpoint.draining = True
    try:
        reply = tiny.complete("a")
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    finally:
        tiny.endpoint.draining = False


def test_it_is_ready_when_it_is_warm():
    warm = threading.Event()

    def warm_up(engine: Engine) -> None:
        assert warm.wait(SECONDS)

    with running(warm_up=warm_up) as found:
        assert found.get("/health").status == 200
        assert found.get("/ready").status == 503
        warm.set()
        until(lambda: found.get("/ready").status == 200)
        found.endpoint.drain()
        assert found.get("/ready").status == 503


def test_an_engine_that_fails_ends_its_requests_and_is_not_healthy():
    with running() as found:
        connection = opened(found)
        until(lambda: found.engine.stats.running == 1)
        found.engine.close()
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert "the engine is closed" in answer.read().decode()
        connection.close()
        until(lambda: found.get("/health").status == 503)
        assert found.get("/ready").status == 503
        reply = found.complete("a")
        assert (reply.status, "the engine has stopped" in reply.body.decode()) == (503, True)


def test_a_thread_that_ends_by_an_error_tells_that_it_was_one(monkeypatch: pytest.MonkeyPatch):
    with running() as found:
        connection = opened(found)
        until(lambda: found.engine.stats.running == 1)

        def fail():
            raise ArithmeticError("a secret of the server")

        monkeypatch.setattr(found.engine, "step", fail)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        told = answer.read().decode()
        connection.close()
        assert "by an error of the server" in told
        assert "secret" not in told
        assert "the server stops" not in told
        assert found.engine.stats.running == 0


def test_chats_wait_for_no_scores(monkeypatch: pytest.MonkeyPatch):
    """Nor are scores computed of clients that have left before their turn."""
    asked, go_on = [], threading.Event()

    with running() as found:
        score = found.engine.score

        def slow_score(*args, **options):
            asked.append(args)
            assert go_on.wait(SECONDS)
            return score(*args, **options)

        monkeypatch.setattr(found.engine, "score", slow_score)
        body = json.dumps({"model": MODEL, "prefix": [1, 2], "continuations": [[3]]}).encode()
        connections = []
        for _ in range(40):  # more than there are threads for texts
            connection = found.connect()
            connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
            connections.append(connection)
        until(lambda: found.endpoint.gate.waiting == 40)
        reply = found.chat([{"role": "user", "content": "hello"}], max_completion_tokens=2)
        assert reply.status == 200
        for connection in connections:
            connection.close()
        until(lambda: found.endpoint.gate.waiting == len(asked))  # whose turn it is
        go_on.set()
        until(lambda: found.endpoint.gate.waiting == 0)
        assert len(asked) < 10


def test_an_error_in_one_request_is_its_own(tiny: Running, monkeypatch: pytest.MonkeyPatch):
    class Broken(BytePairs):
        def decode(self, ids):
            raise ArithmeticError("a secret of the server")

    monkeypatch.setattr(tiny.engine._service.incoming, "_tokenizer", Broken())
    reply = tiny.complete("a")
    monkeypatch.undo()
    assert reply.status == 500
    assert "secret" not in reply.body.decode()
    assert tiny.complete("a").status == 200


def logged(lines: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.getvalue().splitlines()]


@pytest.mark.parametrize("prompts", [False, True])
def test_each_request_is_a_line_of_json_without_its_prompt(prompts: bool):
    lines = io.StringIO()
    log = Log(stream=lines)
    try:
        with running(log_prompts=prompts) as found:
            found.complete("a secret", max_tokens=2, **{"user": "me"})
            found.complete("a secret", max_tokens=2, stream=True)
            found.complete("a secret", colour="red")
            for path in ("/health", "/metrics", "/tree"):
                found.get(path)
    finally:
        log.close()
    requests = [line for line in logged(lines) if line.get("event") == "request"]
    assert [line["status"] for line in requests] == [200, 200, 400]
    for line in requests[:2]:
        assert (line["prompt_tokens"], line["completion_tokens"]) == (8, 2)
        assert line["finish_reasons"] == ["length"]
        assert 0 < line["first_token_seconds"] <= line["seconds"]
        assert len(line["id"]) == 32
    assert requests[2]["param"] == "colour"
    assert ("a secret" in lines.getvalue()) == prompts


def test_a_full_log_loses_lines_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    from jax_chunkattn.server import log as module

    monkeypatch.setattr(module, "MOST_QUEUED", 2)
    go_on = threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            go_on.wait(SECONDS)
            return super().write(text)

    slow = Slow()
    log = Log("tests.slow_log", slow)
    for at in range(50):
        logging.getLogger("tests.slow_log").info("%d", at)
    assert log.lost >= 46
    go_on.set()
    log.close()
    assert len(logged(slow)) == 50 - log.lost


def certificate_in(folder: Path, *options: str) -> tuple[Path, Path]:
    """A certificate of this machine, and its key."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += [*(options or ("-nodes",)), "-days", "1", "-subj", "/CN=localhost", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    folder.mkdir(exist_ok=True)
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@needs_openssl
def test_a_certificate_or_a_key_that_is_none_is_refused_by_its_name(tmp_path: Path):
    certificate, key = certificate_in(tmp_path / "mine")
    other, _ = certificate_in(tmp_path / "other")
    _, encrypted = certificate_in(tmp_path / "encrypted", "-passout", "pass:secret")
    empty = tmp_path / "empty.pem"
    empty.touch()
    Serving(certificate=certificate, private_key=key)
    for files, message in (
        ((empty, key), f"certificate {empty} cannot be used: there is none in it"),
        ((tmp_path / "gone", key), f"certificate {tmp_path / 'gone'} cannot be used: No such file"),
        ((certificate, empty), f"private key {empty} cannot be used: there is none in it"),
        ((certificate, None), f"private key {certificate} cannot be used: there is none in it"),
        ((other, key), f"private key {key} is not that of certificate {other}"),
        ((certificate, encrypted), f"private key {encrypted} is encrypted: give one that is not"),
    ):
        with pytest.raises(TLSError) as caught:
            Serving(certificate=files[0], private_key=files[1])
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@needs_openssl
def test_it_speaks_tls(tmp_path: Path):
    certificate, key = certificate_in(tmp_path)
    serving = Serving(port=0, certificate=certificate, private_key=key)
    with running(serving=serving) as found:
        assert found.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(certificate))
        asked = http.client.HTTPSConnection(*found.address, timeout=SECONDS, context=context)
        asked.request("GET", "/health")
        assert asked.getresponse().status == 200
        asked.close()
