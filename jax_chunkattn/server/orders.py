"""From checked requests to what the engine takes: prompts as tokens, and sampling parameters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jax_chunkattn.engine.text import Tokenizer
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.inbox import Order
from jax_chunkattn.server.limits import Limits
from jax_chunkattn.server.schemas import ChatMessage, ChatRequest, CompletionRequest, Sampled
from jax_chunkattn.server.tenants import Tenant

SHORT = 4096  # characters that are tokenized at once; longer texts have a thread
COMPLETION_TOKENS = 16  # OpenAI's default
SEEDS = 2**32


class ChatTemplate(Protocol):
    """Writes a chat as the tokens that a model was trained on.

    Raises ValueError for messages that it refuses.
    """

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        **variables: Any,
    ) -> list[int]: ...


@dataclass(frozen=True)
class Served:
    """The model that a server names and serves.

    Attributes:
      name: what clients call it.
      max_positions: most tokens of a prompt and its answer.
      pool_tokens: that the pool has room for.
      vocab_size: token ids that it knows, from 0 up.
      tokenizer: of texts; None where there are token ids alone.
      chat: of chats; None where the model has no template.
      created: when it was loaded, in seconds since 1970.
    """

    name: str
    max_positions: int
    pool_tokens: int
    vocab_size: int
    tokenizer: Tokenizer | None = None
    chat: ChatTemplate | None = None
    created: int = 0

    @property
    def most_tokens(self) -> int:
        return min(self.max_positions, self.pool_tokens)


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, as far as can be told before its prompts are tokenized.

    Attributes:
      answers: so many.
      params: of each.
      max_tokens: of each; None for a chat that may be as long as there is room.
    """

    answers: int
    params: SamplingParams
    max_tokens: int | None


def completion_wanted(request: CompletionRequest, served: Served, limits: Limits) -> Wanted:
    """`max_tokens` is at least 1: with 0 only prompts are told, which is one answer.

    Raises ApiError for what cannot be served.
    """
    _check_form(request, served)
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens 0 is for echo: nothing would be told", param="max_tokens")
    if request.max_tokens == 0 and request.stream:
        raise ApiError(400, "with max_tokens 0 there is nothing to stream", param="stream")
    asked = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    params = _params(request, limits, max(asked, 1), logprobs=request.logprobs)
    answers = len(_prompts(request.prompt)) * params.n
    _check_answers(answers, limits)
    return Wanted(answers if asked else 1, params, params.max_tokens)


async def completion_orders(
    request: CompletionRequest, wanted: Wanted, served: Served, limits: Limits, tenant: Tenant
) -> list[Order]:
    """An order for each prompt. Raises ApiError for what cannot be served."""
    orders = []
    for one in _prompts(request.prompt):
        prompt = await tokens_of(one, served)
        _check_prompt(prompt, limits)
        orders.append(Order(prompt, wanted.params, tenant.salt(request.cache_salt)))
    return orders


def chat_wanted(request: ChatRequest, served: Served, limits: Limits) -> Wanted:
    """Raises ApiError for what cannot be served."""
    _check_form(request, served)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    given = (request.max_completion_tokens, request.max_tokens)
    if None not in given and given[0] != given[1]:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens are the same here: give one of them",
            param="max_tokens",
        )
    max_tokens = given[0] if given[0] is not None else given[1]
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = _params(request, limits, max_tokens or 1, logprobs=logprobs)
    _check_answers(params.n, limits)
    return Wanted(params.n, params, max_tokens)


async def chat_order(
    request: ChatRequest, wanted: Wanted, served: Served, limits: Limits, tenant: Tenant
) -> Order:
    """Raises ApiError for what cannot be served."""
    prompt = await _chat_tokens(request, served)
    _check_prompt(prompt, limits)
    params = wanted.params
    if wanted.max_tokens is None:
        room = served.most_tokens - len(prompt)
        most = max(1, min(room, limits.new_tokens or room, limits.default_new_tokens))
        params = replace(params, max_tokens=most)
    return Order(prompt, params, tenant.salt(request.cache_salt))


async def tokens_of(prompt: str | Sequence[int], served: Served) -> Sequence[int]:
    """Raises ApiError for a text that cannot be tokenized."""
    if not isinstance(prompt, str):
        return prompt
    if served.tokenizer is None:
        raise ApiError(400, f"{served.name} has no tokenizer: give token ids", param="prompt")
    try:
        if len(prompt) <= SHORT:
            return served.tokenizer.encode(prompt)
        return await asyncio.to_thread(served.tokenizer.encode, prompt)
    except ValueError as error:
        raise ApiError(400, f"the prompt cannot be tokenized: {error}", param="prompt") from error


async def _chat_tokens(request: ChatRequest, served: Served) -> Sequence[int]:
    if served.chat is None:
        raise ApiError(
            400, f"{served.name} has no chat template: use /v1/completions", param="messages"
        )
    messages = [_for_template(one) for one in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if request.tool_choice == "none":
        tools = []
    variables = dict(request.chat_template_kwargs or {})
    for name in ("messages", "tools"):
        if name in variables:
            raise ApiError(400, f"{name} is given twice", param=f"chat_template_kwargs.{name}")
    try:
        return await asyncio.to_thread(served.chat, messages, tools=tools or None, **variables)
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param="messages") from error


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """As published templates take it: a content that is one text, the older name of the role, and
    a call's arguments as what they are, where they are JSON."""
    plain = message.model_dump(exclude_none=True)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    for call in plain.get("tool_calls", ()):
        with suppress(ValueError, RecursionError):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return plain


def _prompts(prompt: Any) -> list[Any]:
    """Each as a text or a list of ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def require_model(name: str, served: Served) -> None:
    """Raises ApiError when another model is asked for."""
    if name != served.name:
        raise ApiError(
            404,
            f"there is no model {name!r:.100}; {served.name!r} is served",
            param="model",
            code="model_not_found",
        )


def _check_form(request: Sampled, served: Served) -> None:
    require_model(request.model, served)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is for streams", param="stream_options")


def _check_prompt(prompt: Sequence[int], limits: Limits) -> None:
    most = limits.prompt_tokens
    if most is not None and len(prompt) > most:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens; this server takes at most {most}",
            code="context_length_exceeded",
        )


def _check_answers(answers: int, limits: Limits) -> None:
    if answers > limits.answers:
        raise ApiError(
            400,
            f"{answers} answers (n for each prompt) are asked for; this server gives at most "
            f"{limits.answers} to one request",
            param="n",
        )


def _params(
    request: Sampled, limits: Limits, max_tokens: int, *, logprobs: int | None
) -> SamplingParams:
    samples = request.n or 1
    if samples > limits.samples:
        raise ApiError(
            400, f"n is {samples}; this server takes at most {limits.samples}", param="n"
        )
    if limits.new_tokens is not None and max_tokens > limits.new_tokens:
        raise ApiError(
            400,
            f"{max_tokens} new tokens are asked for; this server gives at most {limits.new_tokens}",
            param="max_tokens",
        )
    given = {
        "stop": request.stop,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
    }
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=max(0, request.top_k or 0),
            seed=None if request.seed is None else request.seed % SEEDS,
            logit_bias=_biases(request.logit_bias or {}),
            logprobs=logprobs,
            n=samples,
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    """By token id; JSON has its keys as texts."""
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise ApiError(400, f"logit_bias: {token!r:.40} is no token id", param="logit_bias")
    return {int(token): bias for token, bias in biases.items()}
