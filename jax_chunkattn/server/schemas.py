"""What clients may send, checked before anything else sees it.

Types are strict: a number in quotes is no number. What OpenAI's interface has and this server does
not is in none of these, and so is refused by its name; `UNSUPPORTED` says why of those that clients
do send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

MOST_PROMPTS = 128
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_TEXT = 256

TokenId = Annotated[int, Field(ge=0, lt=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
"""The first error ends it, as everywhere: a list of a million of them would be a million errors."""

UNSUPPORTED: Mapping[str, str] = {
    "best_of": "ask for n answers and choose",
    "suffix": "text cannot be filled in",
    "functions": "tools have taken their place",
    "function_call": "tool_choice has taken its place",
    "audio": "text is all there is",
    "modalities": "text is all there is",
    "prediction": "nothing is predicted",
    "web_search_options": "nothing is searched",
    "guided_json": "answers follow no grammar",
    "guided_regex": "answers follow no grammar",
    "structured_outputs": "answers follow no grammar",
    "use_beam_search": "the library has beam_search",
    "prompt_logprobs": "echo with logprobs, or /v1/score, tells them",
}
"""Fields that other servers know, and what to do without them."""


class Strict(BaseModel):
    """JSON of exactly these fields and types; no number is NaN or infinite."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


class StreamOptions(Strict):
    """What a stream tells besides its answers."""

    include_usage: bool = False


class Sampled(Strict):
    """What both interfaces take of how tokens are chosen."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_TEXT, fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    return_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=MOST_TEXT)] | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(Strict):
    """A part of a message; of its kinds there is text alone."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """What a model asked for in an earlier turn."""

    name: Name
    arguments: str


class ToolCall(Strict):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One message; what the template makes of it is the model's affair."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = (
        None
    )
    tool_call_id: Name | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ResponseFormat(Strict):
    """Text is the only format: answers follow no grammar."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class ScoreRequest(Strict):
    """`POST /v1/score`: how likely the model finds continuations of prefixes."""

    model: Name
    prefix: str | Tokens
    continuations: Annotated[
        list[str | Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)
    ]
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    cache_salt: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    user: Annotated[str, Field(max_length=MOST_TEXT)] | None = None


def explain(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """A message for one error of pydantic, and the field that it is about."""
    where: Sequence[Any] = error["loc"]
    path = [part for part in where if not _is_of_union(part)]
    param = ".".join(map(str, path)) or None
    if error["type"] == "extra_forbidden":
        name = str(path[-1]) if path else "?"
        why = UNSUPPORTED.get(name)
        return f"{param:.100} is not supported{': ' + why if why else ''}", param and param[:100]
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['msg'].removeprefix('Invalid JSON: ')}", None
    for at, part in enumerate(path):
        if part in _UNIONS and error["type"] not in ("too_long", "too_short"):
            name = ".".join(map(str, path[: at + 1]))
            return f"{name} must be {_UNIONS[part]}", name
    return f"{param or 'the body'}: {_lower(error['msg'])}", param


def _is_of_union(part: Any) -> bool:
    """Whether it names a member of a union, which no client has written."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or "[" in part or part in _MODELS
    )


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


_UNIONS = {
    "prompt": "text, token ids, a list of texts, or a list of lists of token ids",
    "prefix": "text or token ids",
    "stop": "text or a list of texts",
    "content": "text, or a list of parts of the type text",
}
_MODELS = {
    one.__name__
    for one in (StreamOptions, TextPart, ChatMessage, Function, FunctionCall, Tool, ToolCall)
}
