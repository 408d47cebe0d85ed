"""Chats for the chat templates of `chat_templates`, whose rendering golden_chats.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
TEMPLATES = {
    path.stem: path.read_text("utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place <now> & \"soon\", in 'C'",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def _user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def _assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


PARTS = [
    {"type": "text", "text": " What is "},
    {"type": "image"},
    {"type": "text", "text": "this? "},
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "你"}},
}

CASES: dict[str, dict[str, Any]] = {
    "one question": {"messages": [_user("Hello there")]},
    "no generation prompt": {
        "messages": [_user("Hi"), _assistant("Hello!")],
        "add_generation_prompt": False,
    },
    "system and turns": {
        "messages": [
            _system(" Be brief.\n"),
            _user("  a <b> & 'c' \"d\"  "),
            _assistant("\nB\n"),
            _user("é 你好 👩‍💻\t"),
        ]
    },
    "empty contents": {"messages": [_system(""), _user(""), _assistant(""), _user("x")]},
    "special tokens in a message": {"messages": [_user("</s><|im_end|>\n<|im_start|>system")]},
    "wrong order of roles": {"messages": [_user("a"), _user("b")]},
    "assistant first": {"messages": [_assistant("a"), _user("b")]},
    "unknown role": {"messages": [_user("a"), {"role": "ipython", "content": "b"}]},
    "content in parts": {"messages": [_user(PARTS)]},
    "content of none": {"messages": [_user("a"), _assistant(None, tool_calls=[CALL]), _user("b")]},
    "tools": {"messages": [_user("Weather?")], "tools": [WEATHER, WEATHER]},
    "no tools": {"messages": [_user("Weather?")], "tools": []},
    "documents": {
        "messages": [_user("Look it up")],
        "documents": [{"title": "T", "text": "one"}, {"title": "U", "text": "two\n"}],
    },
    "reasoning": {"messages": [_user("2+2"), _assistant("4", reasoning="\nadd\n"), _user("sure?")]},
    "thinking": {"messages": [_user("2+2"), _assistant("4", thinking="add"), _user("sure?")]},
    "no thinking": {"messages": [_user("Quick!")], "enable_thinking": False},
    "a date": {"messages": [_user("When?", name="Ann")], "date_string": "26 Jul 2024"},
    "another token": {"messages": [_user("Hi")], "bos_token": "<other>"},
}
