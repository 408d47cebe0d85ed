"""What is sent back: choices, pieces of streams, log-probabilities and usage, as JSON values."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_chunkattn.engine.misses import PromptUse
from jax_chunkattn.engine.outputs import StreamEvent
from jax_chunkattn.engine.text import REPLACEMENT, Tokenizer
from jax_chunkattn.sampling import TokenLogprobs
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.event_stream import DONE, event
from jax_chunkattn.server.jobs import Job
from jax_chunkattn.server.schemas import StreamOptions

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's clients know this number

MISSED = ("too_short", "new", "evicted", "window", "last")
"""Why a prompt's tokens were computed; see `PromptUse`."""


@dataclass(frozen=True)
class Head:
    """What all pieces of an answer begin with."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, prefix: str, kind: str, model: str) -> Head:
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, model)

    def with_choices(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


STOPPED = ApiError(503, "the server stops: the answer is not complete", code="server_stops")


async def pieces_of(
    job: Job,
    head: Head,
    options: StreamOptions | None,
    choice_of: Callable[[int, StreamEvent], dict[str, Any]],
) -> AsyncIterator[bytes]:
    """Events of a stream: the choices that `choice_of` makes of what is new, an error, usage."""
    with_usage = options is not None and options.include_usage
    more = {"usage": None} if with_usage else {}
    try:
        async for number, news in news_of(job):
            yield event(head.with_choices([choice_of(number, news)], **more))
    except ApiError as error:
        yield event(error.body)
    else:
        if with_usage:
            yield event(head.with_choices([], usage=usage_of_job(job)))
    yield DONE


def usage_of_job(job: Job) -> dict[str, Any]:
    """That of a request's answers so far."""
    return usage_of(job.prompt_tokens, job.completion_tokens, job.use)


def usage_of(prompt: int, completion: int, use: PromptUse | None) -> dict[str, Any]:
    """Tokens of a request; of its prompts, which were cached, and why others were not, if that is
    known.

    What another salt has computed counts as new: nobody learns what others have asked.
    """
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if use is not None:
        missed = {name: getattr(use, name) for name in MISSED}
        missed["new"] += use.salt
        cached = use.num_found
        usage["prompt_tokens_details"] = {"cached_tokens": cached, "missed_tokens": missed}
    return usage


def finite(logprob: float) -> float:
    """As JSON can hold it."""
    return max(logprob, LEAST_LOGPROB)


class TokenTexts:
    """Tokens one by one as texts, as log-probabilities name them."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """Without a tokenizer `token_id:7`, as in vLLM."""
        return f"token_id:{token}" if self._tokenizer is None else self._tokenizer.decode([token])

    def together(self, tokens: Sequence[int]) -> str:
        """The text of tokens; empty without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(tokens)

    def chat(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """As chats have them: a list of tokens, each with its alternatives."""
        return {
            "content": [
                {
                    **self._one(token, one.chosen),
                    "top_logprobs": [self._one(*other) for other in one.top],
                }
                for token, one in zip(tokens, logprobs, strict=True)
            ],
            "refusal": None,
        }

    def legacy(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offset: int
    ) -> dict[str, Any]:
        """As completions have them: lists beside each other, offsets in characters from `offset`.

        A prompt's first token, which follows nothing, has none: None stands for it.
        """
        texts, offsets = [self.text(token) for token in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one and finite(one.chosen) for one in logprobs],
            "top_logprobs": [one and self._by_text(one) for one in logprobs],
            "text_offset": offsets,
        }

    def _by_text(self, one: TokenLogprobs) -> dict[str, float]:
        """Of tokens with the same text the likeliest."""
        return {self.text(token): finite(value) for token, value in reversed(one.top)}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        known = REPLACEMENT not in text and self._tokenizer is not None
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": list(text.encode()) if known else None,
        }


async def news_of(job: Job) -> AsyncIterator[tuple[int, StreamEvent]]:
    """What comes of each answer, until all have ended or the client has gone.

    Raises ApiError when one has failed, or the server stops: it alone aborts what is still read.
    """
    while not job.gone and (job.has_news or not job.finished):
        for number, news in await job.take():
            if isinstance(news, ApiError):
                raise news
            if news.finish_reason == "abort":
                raise STOPPED
            yield number, news


async def whole_answers(job: Job) -> list[StreamEvent]:
    """Each answer as one event, when all have ended; none when the client has gone. Raises what
    `news_of` raises."""
    parts: list[list[StreamEvent]] = [[] for _ in range(job.answers)]
    async for number, news in news_of(job):
        parts[number].append(news)
    return [] if job.gone else [_whole(events) for events in parts]


def _whole(events: Sequence[StreamEvent]) -> StreamEvent:
    return StreamEvent(
        tuple(token for event in events for token in event.tokens),
        "".join(event.text for event in events),
        tuple(one for event in events for one in event.logprobs),
        events[-1].finish_reason,
    )
