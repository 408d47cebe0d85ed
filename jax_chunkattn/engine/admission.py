"""What is refused, and why, before a request touches the tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from jax_chunkattn.sampling import MAX_DEFAULT_STOP_TOKENS, MAX_LOGPROBS, SamplingParams
from jax_chunkattn.sampling.params import checked_stop_tokens, require_in_vocabulary
from jax_chunkattn.tree.prefix_tree import PrefixTree


class InvalidRequest(ValueError):
    """A request that this engine can never serve; nothing has changed."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask of an engine at most: work that is done for it whatever the model.

    The model's and the pool's own limits come on top of these.

    Attributes:
      samples: answers to one prompt, `SamplingParams.n`. Each takes up to 1.4 KB while it waits.
      stop_strings: strings in `SamplingParams.stop`. The text of each call is searched for all.
      stop_characters: of any of these. As much of the answer is searched again with each call.

    Raises:
      ValueError: for a limit that is no integer, or no samples.
    """

    samples: int = 1024
    stop_strings: int = 64
    stop_characters: int = 1024

    def __post_init__(self):
        for name, least in (("samples", 1), ("stop_strings", 0), ("stop_characters", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be an integer from {least} up, got {value!r:.60}")


@dataclass(frozen=True)
class ModelSizes:
    """What a model can take: so much of it is known without its arrays, which may be replaced."""

    vocab_size: int
    max_positions: int


def check_prompt(prompt: Any, model: ModelSizes, name: str = "the prompt") -> tuple[int, ...]:
    """The prompt as a tuple of ints, checked; `name` stands for it in messages.

    Raises:
      InvalidRequest: when it is no sequence or empty, or has something that is not a token id of
        the model.
    """
    try:
        ids = np.asarray(prompt)
    except (TypeError, ValueError):  # unequal sequences in one, say
        ids = np.asarray(None)
    if ids.ndim == 1 and not ids.size:
        raise InvalidRequest(f"{name} is empty: it needs at least one token")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidRequest(f"{name} must be a sequence of token ids, got {prompt!r:.60}")
    outside = (ids < 0) | (ids >= model.vocab_size)
    if outside.any():
        where = int(np.argmax(outside))
        raise InvalidRequest(
            f"{name} has token id {ids[where]} at position {where}; "
            f"the model's ids go from 0 to {model.vocab_size - 1}"
        )
    return tuple(ids.tolist())


def check_text(text: Any, name: str) -> bytes:
    """The text in UTF-8; raises InvalidRequest when it is none, or no UTF-8 can hold it."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must be text, got {text!r:.60}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has half a surrogate pair, {text[error.start]!a}, at character {error.start}: "
            "that is no text"
        ) from None


def each_request(prompts: Any, params: Any) -> list[tuple[Any, Any]]:
    """Prompts, of which a text alone is one, each with its parameters: their own or the same.

    Raises:
      InvalidRequest: when either is no sequence, their numbers differ, or the prompts are ids.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts must be a sequence of prompts, got {prompts!r:.60}")
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], Integral):
        raise InvalidRequest(
            f"prompts must be a sequence of prompts, got {prompts!r:.60}: "
            "put the token ids of one in a list"
        )
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    if not isinstance(params, Iterable):
        raise InvalidRequest(
            f"params must be SamplingParams, or one for each prompt, got {params!r:.60}"
        )
    params = list(params)
    if len(params) != len(prompts):
        raise InvalidRequest(f"{len(params)} sampling parameters for {len(prompts)} prompts")
    return list(zip(prompts, params, strict=True))


def check_sampling(params: Any, limits: RequestLimits, name: str) -> None:
    """Raises InvalidRequest when these are no sampling parameters, or ask for more than allowed."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"{name} needs SamplingParams, got {params!r:.60}")
    longest = max(map(len, params.stop), default=0)
    for asked, most, what in (
        (params.n, limits.samples, "answers (n)"),
        (len(params.stop), limits.stop_strings, "stop strings"),
        (longest, limits.stop_characters, "characters in a stop string"),
    ):
        if asked > most:
            raise InvalidRequest(
                f"{name} asks for {asked:,} {what}; this engine takes at most {most:,} "
                "(RequestLimits)"
            )


def check_positions(
    prompt_tokens: int,
    max_tokens: int,
    model: ModelSizes,
    name: str = "the prompt",
    *,
    virtual: int = 0,
) -> None:
    """Raises InvalidRequest when the model has fewer positions than that, behind so many virtual
    tokens."""
    if virtual + prompt_tokens + max_tokens > model.max_positions:
        behind = f" behind {virtual} virtual ones" if virtual else ""
        more = f" and asks for {max_tokens} more" if max_tokens else ""
        raise InvalidRequest(
            f"{name} has {prompt_tokens} tokens{behind}{more}; "
            f"the model has {model.max_positions} positions"
        )


def check_params(
    params: SamplingParams,
    prompt_tokens: int,
    model: ModelSizes,
    name: str = "the prompt",
    *,
    virtual: int = 0,
) -> None:
    """Raises InvalidRequest when the model cannot serve these parameters with such a prompt."""
    check_positions(prompt_tokens, params.max_tokens, model, name, virtual=virtual)
    try:
        params.check_vocabulary(model.vocab_size)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}") from None


def check_priority(priority: Any) -> int:
    """The priority as an int; raises InvalidRequest when it is none."""
    if isinstance(priority, bool) or not isinstance(priority, Integral):
        raise InvalidRequest(f"priority must be an integer, got {priority!r:.60}")
    return int(priority)


def check_top(top: Any) -> None:
    """Raises InvalidRequest when this is no number of likeliest tokens that can be reported."""
    if isinstance(top, bool) or not isinstance(top, Integral) or not 0 <= int(top) <= MAX_LOGPROBS:
        raise InvalidRequest(f"top must be an integer from 0 to {MAX_LOGPROBS}, got {top!r:.60}")


def check_stop_tokens(tokens: Any, model: ModelSizes) -> tuple[int, ...]:
    """An engine's own stop tokens as ints, `MAX_DEFAULT_STOP_TOKENS` at most.

    Raises:
      ValueError: when there are more, or something that is not a token id of the model.
    """
    checked = checked_stop_tokens("stop_tokens", tokens, MAX_DEFAULT_STOP_TOKENS)
    require_in_vocabulary("stop_tokens", checked, model.vocab_size)
    return checked


def chunks_to_finish(prompt_tokens: int, max_tokens: int, chunk_size: int) -> int:
    """Chunks a request holds at its end; the last token's keys and values are never needed."""
    return -(-(prompt_tokens + max_tokens - 1) // chunk_size)


def chunks_needed(
    prompts: Sequence[Sequence[int]], max_tokens: int, *, chunk_size: int, sharing: bool = True
) -> int:
    """The smallest pool, in chunks, that decodes these prompts together to the end."""
    total = sum(chunks_to_finish(len(prompt), max_tokens, chunk_size) for prompt in prompts)
    if not sharing:
        return total
    tree = PrefixTree(total, chunk_size)
    return total - sum(tree.insert(prompt).num_cached_tokens // chunk_size for prompt in prompts)
