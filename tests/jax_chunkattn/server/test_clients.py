"""Clients that people have work as they are: OpenAI's own, sync and async, and curl."""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.jax_chunkattn.engine.engines import BytePairs
from tests.jax_chunkattn.server.endpoints import MODEL, Running, write_chat
from tests.jax_chunkattn.toy import greedy_without_cache

if find_spec("openai") is None:
    pytest.skip("needs openai, of the extra clients", allow_module_level=True)

MESSAGES = [{"role": "user", "content": "Why?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def answer() -> str:
    """What a model without a cache answers."""
    return BytePairs().decode(greedy_without_cache(write_chat(MESSAGES, tools=None), 6))


@pytest.fixture(scope="session")
def openai() -> Any:
    """The package, which takes a second to import."""
    return importlib.import_module("openai")


@pytest.fixture
def client(openai, tiny: Running) -> Iterator:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_models_and_completions(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    done = client.completions.create(
        model=MODEL, prompt="Why?", max_tokens=4, temperature=0, echo=True, logprobs=2
    )
    expected = greedy_without_cache(BytePairs().encode("Why?"), 4)
    assert done.choices[0].text == "Why?" + BytePairs().decode(expected)
    assert len(done.choices[0].logprobs.token_logprobs) == 8
    ids = client.completions.create(model=MODEL, prompt=[[1, 2], [3]], max_tokens=2)
    assert [choice.index for choice in ids.choices] == [0, 1]


def test_chats(client):
    done = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=6,
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=3,
        tools=[],
        user="somebody",
    )
    assert [choice.message.content for choice in done.choices] == [answer(), answer()]
    for choice in done.choices:
        assert choice.finish_reason == "length"
        assert [len(one.top_logprobs) for one in choice.logprobs.content] == [3] * 6
    assert done.usage.completion_tokens == 12
    assert done.usage.prompt_tokens_details.cached_tokens >= 0


def test_streams(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == answer()
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 6
    pieces = client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=9, stream=True)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"


def test_the_stream_helper_makes_a_whole_of_it(openai, client):
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0, tools=[TOOL]
    ) as stream:
        for _ in stream:
            pass
        with pytest.raises(openai.LengthFinishReasonError):
            stream.get_final_completion()
        assert stream.current_completion_snapshot.choices[0].finish_reason == "length"


def test_many_at_once(openai, tiny: Running):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none") as client:

            async def one(streams: bool) -> str:
                asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
                if not streams:
                    done = await client.chat.completions.create(**asked)
                    return done.choices[0].message.content
                stream = await client.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content async for chunk in stream])

            return await asyncio.gather(*(one(bool(at % 2)) for at in range(12)))

    assert asyncio.run(ask()) == [answer()] * 12


def test_tools_and_their_calls(client, tiny: Running, monkeypatch: pytest.MonkeyPatch):
    """The toy model calls no tools: its tokenizer has each of its tokens say so."""
    call = '<tool_call>{"name": "weather", "arguments": {"place": "Oslo"}}</tool_call>'

    class Calls(BytePairs):
        def decode(self, ids):
            return f"Wait. {call}!" * len(ids)

    monkeypatch.setattr(tiny.engine._service.incoming, "_tokenizer", Calls())
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    done = client.chat.completions.create(**asked, tools=[TOOL], stop="!")
    [choice] = done.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait.")
    [found] = choice.message.tool_calls
    assert found.function.name == "weather"
    assert json.loads(found.function.arguments) == {"place": "Oslo"}
    chunks = list(client.chat.completions.create(**asked, tools=[TOOL], stream=True, stop="!"))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [one.function.name for one in streamed] == ["weather"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == "Wait."


def test_errors_are_the_clients_own(openai, client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="best_of is not supported") as refused:
        client.completions.create(model=MODEL, prompt="a", best_of=3)
    assert refused.value.param == "best_of"
    with pytest.raises(openai.BadRequestError, match=r"response_format.type") as refused:
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}
        )
    assert refused.value.type == "invalid_request_error"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(tiny: Running):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    command = ["curl", "-sN", f"{tiny.url}/v1/chat/completions", "--json"]
    done = subprocess.run([*command, json.dumps(asked)], capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == answer()
    streamed = subprocess.run(
        [*command, json.dumps(asked | {"stream": True})], capture_output=True, check=True
    )
    assert streamed.stdout.endswith(b"data: [DONE]\n\n")
