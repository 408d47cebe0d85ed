"""`/v1/completions`: answers to prompts, whole or in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_chunkattn.engine.outputs import StreamEvent
from jax_chunkattn.sampling import TokenLogprobs
from jax_chunkattn.server.answers import Head, TokenTexts, pieces_of, usage_of, usage_of_job
from jax_chunkattn.server.inbox import Inbox, Order
from jax_chunkattn.server.jobs import Job
from jax_chunkattn.server.schemas import CompletionRequest
from jax_chunkattn.server.scores import Scorer


@dataclass(frozen=True)
class Echo:
    """What an answer repeats of its prompt."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass
class Completions:
    """Writes the answers to one request.

    Attributes:
      request: as it came.
      head: of all pieces.
      texts: of single tokens.
      echoes: of each prompt, if they are asked for.
    """

    request: CompletionRequest
    head: Head
    texts: TokenTexts
    echoes: Sequence[Echo] = ()
    _characters: dict[int, int] = field(default_factory=dict)

    def only_echoes(self, orders: Sequence[Order]) -> dict[str, Any]:
        """The prompts alone, where no token is asked for."""
        samples = orders[0].params.n
        choices = [
            self._choice(number * samples + sample, order, StreamEvent(finish_reason="length"))
            for number, order in enumerate(orders)
            for sample in range(samples)
        ]
        usage = usage_of(sum(len(order.prompt) for order in orders), 0, None)
        return self.head.with_choices(choices, usage=usage)

    def whole(self, job: Job, answers: Sequence[StreamEvent]) -> dict[str, Any]:
        choices = [
            self._choice(number, job.order_of(number), answer)
            for number, answer in enumerate(answers)
        ]
        return self.head.with_choices(choices, usage=usage_of_job(job))

    def pieces(self, job: Job) -> AsyncIterator[bytes]:
        """Events of a stream."""

        def choice_of(number: int, news: StreamEvent) -> dict[str, Any]:
            return self._choice(number, job.order_of(number), news)

        return pieces_of(job, self.head, self.request.stream_options, choice_of)

    def _choice(self, number: int, order: Order, answer: StreamEvent) -> dict[str, Any]:
        """A piece of an answer, or all of it."""
        first = number not in self._characters
        offset = self._characters.setdefault(number, 0)
        text, tokens = answer.text, answer.tokens
        logprobs: tuple[TokenLogprobs | None, ...] = answer.logprobs
        if first and self.echoes:
            echo = self.echoes[number // order.params.n]
            text, tokens = echo.text + text, echo.tokens + tokens
            logprobs = echo.logprobs + logprobs
        choice: dict[str, Any] = {
            "index": number,
            "text": text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        if self.request.logprobs is not None:
            choice["logprobs"] = self.texts.legacy(tokens, logprobs, offset)
            written = choice["logprobs"]["tokens"]
            self._characters[number] += sum(map(len, written))
        if self.request.return_token_ids:
            choice["token_ids"] = list(answer.tokens)
            choice["prompt_token_ids"] = list(order.prompt) if first else None
        return choice


async def echoes_of(
    request: CompletionRequest,
    orders: Sequence[Order],
    scorer: Scorer,
    texts: TokenTexts,
    inbox: Inbox,
) -> list[Echo]:
    """What the answers are to repeat; with the log-probabilities of the prompts, if those of the
    answers are asked for. Nothing more is computed when the client has gone."""
    given = _texts_given(request)
    echoes = []
    for index, order in enumerate(orders):
        if inbox.gone:
            break
        tokens = tuple(order.prompt)
        text = given[index] if given else await asyncio.to_thread(texts.together, tokens)
        if request.logprobs is None:
            echoes.append(Echo(text, tokens))
            continue
        logprobs: tuple[TokenLogprobs | None, ...] = (None,)
        if len(tokens) > 1:
            scored = await scorer.score(
                inbox, tokens[:1], [tokens[1:]], top=request.logprobs, salt=order.salt
            )
            if not scored:
                break
            logprobs += scored[0].logprobs
        echoes.append(Echo(text, tokens, logprobs))
    return echoes


def _texts_given(request: CompletionRequest) -> list[str]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [one for one in prompt if isinstance(one, str)]
