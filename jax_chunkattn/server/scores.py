"""`/v1/score`: how likely the model finds continuations of prefixes, each prefix computed once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.engine.outputs import Score
from jax_chunkattn.server.answers import TokenTexts, finite, usage_of
from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.inbox import Inbox
from jax_chunkattn.server.limits import Limits
from jax_chunkattn.server.orders import Served, require_model, tokens_of
from jax_chunkattn.server.schemas import ScoreRequest

AT_ONCE = 8  # continuations; a client that has gone ends what is behind them


async def score(
    request: ScoreRequest,
    engine: Engine,
    served: Served,
    limits: Limits,
    inbox: Inbox,
    texts: TokenTexts,
) -> dict[str, Any]:
    """Scores of all continuations; nothing more is computed when the client has gone.

    Raises ApiError, and what `Engine.score` raises.
    """
    require_model(request.model, served)
    prefix = await tokens_of(request.prefix, served)
    continuations = [await tokens_of(one, served) for one in request.continuations]
    check_scored(len(prefix) + sum(map(len, continuations)), limits)
    salt, top = inbox.tenant.salt(request.cache_salt), max(1, request.top_logprobs or 0)
    found: list[Score] = []
    for begin in range(0, len(continuations), AT_ONCE):
        if inbox.gone:
            break
        part = continuations[begin : begin + AT_ONCE]
        found += await asyncio.to_thread(engine.score, prefix, part, top=top, salt=salt)
    data = [_one(index, one, request, texts) for index, one in enumerate(found)]
    usage = usage_of(len(prefix) + sum(map(len, continuations)), 0, None)
    return {"object": "list", "model": served.name, "data": data, "usage": usage}


def check_scored(tokens: int, limits: Limits) -> None:
    """Raises ApiError for more than one request may have scored."""
    if tokens > limits.score_tokens:
        raise ApiError(
            400,
            f"{tokens} tokens are to be scored; this server takes at most {limits.score_tokens} "
            "in one request",
        )


def _one(index: int, score: Score, request: ScoreRequest, texts: TokenTexts) -> dict[str, Any]:
    told: dict[str, Any] = {
        "index": index,
        "object": "score",
        "score": finite(score.total),
        "is_greedy": score.is_greedy,
        "tokens": list(score.tokens),
        "token_logprobs": [finite(one.chosen) for one in score.logprobs],
    }
    if request.top_logprobs:
        content: Sequence[Any] = texts.chat(score.tokens, score.logprobs)["content"]
        told["top_logprobs"] = [one["top_logprobs"] for one in content]
    return told
