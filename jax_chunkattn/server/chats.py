"""`/v1/chat/completions`: answers to chats, whole or in pieces, with the calls of tools in them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_chunkattn.engine.outputs import StreamEvent
from jax_chunkattn.server.answers import Head, TokenTexts, pieces_of, usage_of_job
from jax_chunkattn.server.jobs import Job
from jax_chunkattn.server.schemas import ChatRequest
from jax_chunkattn.server.tool_calls import ToolCallReader


@dataclass
class Chats:
    """Writes the answers to one request.

    Attributes:
      request: as it came.
      head: of all pieces.
      texts: of single tokens.
    """

    request: ChatRequest
    head: Head
    texts: TokenTexts
    _readers: dict[int, ToolCallReader] = field(default_factory=dict)

    @property
    def reads_calls(self) -> bool:
        return bool(self.request.tools) and self.request.tool_choice != "none"

    def whole(self, job: Job, answers: Sequence[StreamEvent]) -> dict[str, Any]:
        choices = []
        for number, answer in enumerate(answers):
            text, calls = self._part(number, answer)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text.strip() or None, "tool_calls": calls}
            choice = self._choice(number, answer)
            choices.append({**choice, "message": message, **self._ids(job, number, answer)})
        return self.head.with_choices(choices, usage=usage_of_job(job))

    def pieces(self, job: Job) -> AsyncIterator[bytes]:
        """Events of a stream; a call of a tool comes as a whole."""
        begun: set[int] = set()

        def choice_of(number: int, news: StreamEvent) -> dict[str, Any]:
            before = len(self._readers[number].calls) if number in self._readers else 0
            text, calls = self._part(number, news)
            delta: dict[str, Any] = {"content": text}
            if number not in begun:
                delta = {"role": "assistant", **delta}
            if calls:
                numbered = enumerate(calls, before)
                delta["tool_calls"] = [{"index": at, **call} for at, call in numbered]
            choice = {**self._choice(number, news), "delta": delta}
            if number not in begun:
                choice |= self._ids(job, number, news)
            elif self.request.return_token_ids:
                choice["token_ids"] = list(news.tokens)
            begun.add(number)
            return choice

        return pieces_of(job, self.head, self.request.stream_options, choice_of)

    def _part(self, number: int, answer: StreamEvent) -> tuple[str, list[dict[str, Any]]]:
        """Text of a piece, and the calls that are whole with it."""
        if not self.reads_calls:
            return answer.text, []
        reader = self._readers.setdefault(number, ToolCallReader())
        text, calls = reader.push(answer.text)
        if answer.finish_reason is not None:
            rest, more = reader.finish()
            text, calls = text + rest, calls + more
        return text, calls

    def _choice(self, number: int, answer: StreamEvent) -> dict[str, Any]:
        reason = answer.finish_reason
        if reason == "stop" and number in self._readers and self._readers[number].calls:
            reason = "tool_calls"
        logprobs = self.texts.chat(answer.tokens, answer.logprobs) if answer.logprobs else None
        return {"index": number, "logprobs": logprobs, "finish_reason": reason}

    def _ids(self, job: Job, number: int, answer: StreamEvent) -> dict[str, Any]:
        if not self.request.return_token_ids:
            return {}
        prompt = list(job.order_of(number).prompt)
        return {"token_ids": list(answer.tokens), "prompt_token_ids": prompt}
