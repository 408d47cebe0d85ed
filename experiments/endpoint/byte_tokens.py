"""Bytes for tokens, so that a model of random weights, without a tokenizer, can be talked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BYTES = 256


class ByteTokenizer:
    """Each byte of UTF-8 is the token of its number; other tokens have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < BYTES).decode(errors="replace")

    def write_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        **variables: Any,
    ) -> list[int]:
        """Each message in a line, behind its role. Raises ValueError when there is more."""
        if tools or variables:
            more = ["tools"] if tools else sorted(variables)
            raise ValueError(f"this model has no chat template that knows {', '.join(more)}")
        lines = [f"{message['role']}: {message.get('content') or ''}" for message in messages]
        return self.encode("\n".join([*lines, "assistant: "]))
