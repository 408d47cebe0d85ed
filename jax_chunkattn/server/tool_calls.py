"""Calls of tools in a model's answer, in the form that Hermes, Qwen and SmolLM write.

`<tool_call>` before and `</tool_call>` behind an object with `name` and `arguments`. What is not so
stays text.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


class ToolCallReader:
    """Parts one answer's text, which comes in pieces, from the calls in it.

    Attributes:
      calls: found so far, as chats have them.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text that is certainly none of a call, and the calls that are whole now."""
        self._held += text
        given, new = [], []
        while True:
            begin = self._held.find(BEGIN)
            if begin < 0:
                keep = _beginning_at_end(self._held)
                given.append(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                break
            end = self._held.find(END, begin)
            if end < 0:
                given.append(self._held[:begin])
                self._held = self._held[begin:]
                break
            call = self._read(self._held[begin + len(BEGIN) : end])
            given.append(self._held[: begin if call else end + len(END)])
            self._held = self._held[end + len(END) :]
            if call:
                new.append(call)
        return "".join(given), new

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back; a call that lacks its end alone is one."""
        held, self._held = self._held, ""
        call = self._read(held.removeprefix(BEGIN)) if held.startswith(BEGIN) else None
        return ("", [call]) if call else (held, [])

    def _read(self, text: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = value.get("name") if isinstance(value, dict) else None
        arguments = value.get("arguments", {}) if isinstance(value, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        self.calls.append(
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": json.dumps(arguments, ensure_ascii=False),
                },
            }
        )
        return self.calls[-1]


def _beginning_at_end(text: str) -> int:
    """How many of the last characters may be the beginning of a call."""
    for count in range(min(len(BEGIN) - 1, len(text)), 0, -1):
        if text.endswith(BEGIN[:count]):
            return count
    return 0
