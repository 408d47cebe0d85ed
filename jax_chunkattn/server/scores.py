"""`/v1/score`: how likely the model finds continuations of prefixes, each prefix computed once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
THREADS = 2


class Scorer:
    """Scores by an engine, in threads of their own: who needs a thread for a text or a template
    waits for no score."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="score")

    async def score(
        self,
        inbox: Inbox,
        prefix: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        top: int,
        salt: str,
    ) -> tuple[Score, ...]:
        """As `Engine.score`; nothing for a client that goes before it is its turn."""

        def ask() -> tuple[Score, ...]:
            if inbox.gone:
                return ()
            return tuple(self._engine.score(prefix, continuations, top=top, salt=salt))

        turn = self._threads.submit(ask)
        found = asyncio.ensure_future(asyncio.wrap_future(turn))
        gone = asyncio.ensure_future(inbox.take())  # of which there is no news
        try:
            await asyncio.wait({found, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not found.done() and turn.cancel():
            return ()
        return await found

    def close(self) -> None:
        """Begins nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def score(
    request: ScoreRequest,
    scorer: Scorer,
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
        found += await scorer.score(inbox, prefix, part, top=top, salt=salt)
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
