"""`python -m experiments load`, small: what it says of an endpoint is what the endpoint did."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra server")

from experiments.endpoint import config as endpoint_config
from experiments.endpoint import run as endpoint_run
from experiments.endpoint.byte_tokens import ByteTokenizer
from experiments.endpoint.command import run as run_endpoint
from experiments.endpoint.config import EndpointConfig
from experiments.harness.errors import CheckFailed, UserError
from experiments.harness.reading import read_result
from experiments.load import run as load_run
from experiments.load.asking import ask_endpoint, ask_engine
from experiments.load.client import Client, Refused
from experiments.load.command import headline, run
from experiments.load.config import LoadConfig, check
from experiments.load.views import tables
from experiments.load.workload import sessions_of
from tests.experiments.results import lines_in
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.server.endpoints import Running, running

SMALL = LoadConfig(
    sessions=5, turns=2, at_once=3, shared_tokens=40, own_tokens=5, completion_tokens=6, rounds=1,
    system_prompts=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Iterator[Running]:
    with running() as made:
        yield made


def test_an_endpoint_and_the_engine_give_the_same_conversations(found: Running):
    sessions = sessions_of(SMALL, 1)

    async def ask():
        client = Client(f"{found.url}/v1")
        assert await client.models() == ["tiny"]
        asked = await ask_endpoint(client, "tiny", sessions, max_tokens=6, at_once=3)
        await client.close()
        return asked

    asked = asyncio.run(ask())
    alone = ask_engine(make_engine(), sessions, max_tokens=6, at_once=3)
    assert asked.errors == alone.errors == ()
    answers = [sorted(one.tokens for one in side.answers) for side in (asked, alone)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 10
    for one in (*asked.answers, *alone.answers):
        assert one.first is not None
        assert one.last is not None
        assert one.began < one.first <= one.last
        assert one.finish_reason == "length"
        assert one.prompt_tokens in (45, 56)
    cached = [sum(one.cached_tokens or 0 for one in side.answers) for side in (asked, alone)]
    assert min(cached) > 100


def test_conversations_share_what_is_said_and_nothing_else():
    first, second = sessions_of(SMALL, 1), sessions_of(SMALL, 2)
    assert [one.begin for one in first] == [one.begin for one in second]
    assert len({one.begin for one in first}) == 2
    assert first[0].begin == first[2].begin != first[1].begin
    turns = [turn for one in (*first, *second) for turn in one.turns]
    assert len(set(turns)) == len(turns) == 20
    assert first == sessions_of(SMALL, 1)
    due = [one.due for one in first]
    assert due == sorted(due)
    assert due[0] == 0


def test_load_on_any_endpoint(found: Running, tmp_path: Path):
    config = LoadConfig(
        url=f"{found.url}/v1", sessions=4, rate=50.0, shared_tokens=40, own_tokens=5,
        completion_tokens=4, rounds=2, output=tmp_path / "out",
    )  # fmt: skip
    before = found.engine.stats
    summary = run(config)
    after = found.engine.stats
    assert after.submitted - before.submitted == 12  # with the round to warm up
    [side] = summary["sides"].values()
    assert side["requests"] == 8
    assert 0 < side["cached"] < 1
    assert side["first_token"]["p50"] > 0
    assert summary["overhead"] is None
    assert headline(summary)["tokens/s, endpoint"] == side["tokens_per_second"]
    _, *rounds = lines_in(tmp_path / "out")
    assert [one["number"] for one in rounds] == [0, 1, 2]
    assert all(one["tokens"] == 16 for one in rounds)
    [table] = tables(read_result(tmp_path / "out"))
    assert "4 conversations of 1 turns, 50.0 a second" in table.title


def test_what_is_refused_is_told(found: Running, tmp_path: Path):
    config = LoadConfig(
        url=f"{found.url}/v1", name="other", sessions=2, rounds=1, output=tmp_path / "out"
    )
    with pytest.raises(CheckFailed, match=r"4 requests had no answer, such as: Refused: 404"):
        run(config)
    with pytest.raises(UserError, match="cannot be asked"):
        run(LoadConfig(url="http://127.0.0.1:9/v1", sessions=1, output=tmp_path / "other"))
    with pytest.raises(UserError, match="--url must be such as"):
        check(LoadConfig(url="localhost"))

    async def ask() -> None:
        await Client(f"{found.url}/v1").complete("tiny", [999], 1)

    with pytest.raises(Refused, match="token id 999"):
        asyncio.run(ask())


@pytest.mark.slow
@pytest.mark.thorough
def test_an_endpoint_of_our_own_is_compared_with_the_engine(tmp_path: Path):
    small = {name: value for name, value in LoadConfig.SMOKE.items() if name != "model"}
    summary = run(LoadConfig(**small, output=tmp_path / "out"))
    assert set(summary["sides"]) == {"endpoint", "engine"}
    speeds = [side["tokens_per_second"] for side in summary["sides"].values()]
    assert summary["overhead"] == pytest.approx(1 - speeds[0] / speeds[1], abs=1e-2)
    assert summary["sides"]["endpoint"]["cached"] == summary["sides"]["engine"]["cached"]


def test_an_endpoint_that_does_not_end_is_killed(capfd):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += "print('deaf', flush=True)\ntime.sleep(600)"
    command = [sys.executable, "-S", "-c", deaf]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "deaf\n"
    load_run._end(process, 0.1)
    assert process.returncode == -signal.SIGKILL
    assert capfd.readouterr().err == "the endpoint had not ended after 0.1 s, and was killed\n"


def test_the_endpoint_serves_until_it_is_told_to_stop(tmp_path: Path, capfd):
    config = EndpointConfig(model="random:tiny", port=0, warm_up=False, seconds=0.3)
    summary = run_endpoint(config)
    said = capfd.readouterr()
    assert "random:tiny is served at http://127.0.0.1:" in said.out
    assert summary["answers"] == summary["failed"] == 0
    lines = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines if "event" in line] == ["ready"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0"}, "lets everybody ask who reaches it: give --keys FILE, or --open"),
        ({"port": 70_000}, "--port must be from 0 to 65535"),
        ({"keys": Path("none")}, "--keys none cannot be read"),
        ({"certificate": Path("none")}, "--certificate none: there is no such file"),
        ({"private_key": Path("none")}, "--private-key is of a --certificate"),
        ({"pool_memory": "much"}, "--pool-memory much"),
        ({"kv_events": "nowhere"}, "--kv-events nowhere: "),
        ({"grace": -1.0}, "--grace must be"),
        ({"streams": 0}, "--streams must be at least 1"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(changes, message: str):
    with pytest.raises(UserError, match=message):
        run_endpoint(EndpointConfig(model="random:tiny", **changes))
    assert endpoint_config.LOOPBACK[0] == EndpointConfig().host


def test_an_address_or_a_certificate_that_cannot_be_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint_run, "load_model", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            run_endpoint(EndpointConfig(model="random:tiny", port=port))
        assert str(caught.value) == f"--host 127.0.0.1 --port {port}: Address already in use"
    certificate = tmp_path / "certificate.pem"
    certificate.touch()
    with pytest.raises(UserError, match=f"certificate {certificate} cannot be used"):
        run_endpoint(EndpointConfig(model="random:tiny", port=0, certificate=certificate))


def test_bytes_stand_for_tokens():
    words = ByteTokenizer()
    assert words.decode([*words.encode("Grüße"), 700]) == "Grüße"
    chat = words.write_chat([{"role": "user", "content": "hi"}], tools=None)
    assert words.decode(chat) == "user: hi\nassistant: "
    with pytest.raises(ValueError, match="knows tools"):
        words.write_chat([], tools=[{}])
