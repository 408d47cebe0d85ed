"""Chats are written by the model's template, and calls of tools are read out of answers."""

from __future__ import annotations

import json

import pytest

from jax_chunkattn.server.tool_calls import ToolCallReader
from tests.jax_chunkattn.engine.engines import BytePairs
from tests.jax_chunkattn.server.endpoints import Running, joined, write_chat
from tests.jax_chunkattn.toy import greedy_without_cache

MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Why?"},
]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a place", "parameters": {"type": "object"}},
}


def test_a_chat_is_answered_behind_its_template(tiny: Running):
    reply = tiny.chat(MESSAGES, max_completion_tokens=5, return_token_ids=True)
    [choice] = reply.value["choices"]
    prompt = write_chat(MESSAGES, tools=None)
    assert choice["prompt_token_ids"] == prompt
    expected = BytePairs().decode(greedy_without_cache(prompt, 5))
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert reply.value["object"] == "chat.completion"
    assert reply.value["usage"]["prompt_tokens"] == len(prompt)


def test_a_stream_has_the_same_in_pieces(tiny: Running):
    fields = {"max_tokens": 9, "n": 2, "seed": 1, "temperature": 1.0, "logprobs": True}
    fields["top_logprobs"] = 2
    whole = tiny.chat(MESSAGES, **fields).value["choices"]
    events = tiny.chat(MESSAGES, **fields, stream=True).events
    for index, choice in enumerate(whole):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert not any("role" in piece["delta"] for piece in pieces[1:])
        text = "".join(piece["delta"]["content"] for piece in pieces)
        assert text == choice["message"]["content"]
        told = joined(piece["logprobs"]["content"] for piece in pieces)
        assert [one["token"] for one in told] == [
            one["token"] for one in choice["logprobs"]["content"]
        ]
        assert len(told) == 9
        assert all(len(one["top_logprobs"]) == 2 for one in told)


def test_parts_roles_and_variables_reach_the_template(tiny: Running):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    reply = tiny.chat(
        messages, max_tokens=1, return_token_ids=True, chat_template_kwargs={"shout": True}
    )
    prompt = bytes(reply.value["choices"][0]["prompt_token_ids"]).decode()
    assert prompt == "SYSTEM: BE BRIEF\nUSER: A\nB\nASSISTANT: "


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_tools_reach_the_template(tiny: Running, choice: str | None):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Oslo"}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    fields = {} if choice is None else {"tool_choice": choice}
    reply = tiny.chat(messages, tools=[WEATHER], max_tokens=1, return_token_ids=True, **fields)
    prompt = bytes(reply.value["choices"][0]["prompt_token_ids"]).decode()
    assert ("tools [" in prompt) == (choice != "none")
    assert '"arguments": {"place": "Oslo"}' in prompt


def test_what_the_template_refuses_is_refused(tiny: Running):
    reply = tiny.chat([{"role": "tool", "content": "rain"}])
    assert reply.status == 400
    assert reply.value["error"]["message"] == "a tool's message needs a tool_call_id"


def test_an_answer_goes_on_to_the_last_position(tiny: Running):
    reply = tiny.chat([{"role": "user", "content": "x" * 900}])
    assert reply.value["usage"]["total_tokens"] == tiny.endpoint.served.most_tokens == 1024
    assert reply.value["choices"][0]["finish_reason"] == "length"


ANSWER = (
    'I look.<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
    '<tool_call>{"name": "time"}</tool_call> <tool_ca'
)


@pytest.mark.parametrize("size", [1, 2, 5, 11, 1000])
def test_calls_are_read_out_of_a_text_however_it_is_cut(size: int):
    reader, texts, calls = ToolCallReader(), [], []
    for begin in range(0, len(ANSWER), size):
        text, new = reader.push(ANSWER[begin : begin + size])
        texts.append(text)
        calls += new
    rest, new = reader.finish()
    assert "".join([*texts, rest]) == "I look. <tool_ca"
    assert new == []
    assert calls == reader.calls
    assert [call["function"]["name"] for call in calls] == ["weather", "time"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"place": "Oslo"}
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no JSON</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>["name"]</tool_call>',
        '<tool_call>{"name": "a", "arguments": "b"}</tool_call>',
        "<tool_call>" + 5000 * "[" + "</tool_call>",
        "<tool_call> and no more",
    ],
    ids=["text", "nameless", "list", "arguments", "deep", "open"],
)
def test_what_is_no_call_stays_text(text: str):
    reader = ToolCallReader()
    given, calls = reader.push(f"a{text}b")
    rest, more = reader.finish()
    assert given + rest == f"a{text}b"
    assert calls + more == []


def test_a_call_that_lacks_its_end_alone_is_one():
    reader = ToolCallReader()
    assert reader.push('<tool_call>{"name": "a", "arguments": {}}') == ("", [])
    text, [call] = reader.finish()
    assert (text, call["function"]["name"]) == ("", "a")
