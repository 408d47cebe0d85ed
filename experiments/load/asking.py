"""A round of conversations, with an endpoint or with an engine; what came of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.load.client import Client, Refused, Streamed
from experiments.load.workload import Session
from jax_chunkattn import Engine, RequestHandle, SamplingParams


@dataclass(frozen=True)
class Asked:
    """A round: its answers, whatever was refused or lost, and how long it took."""

    answers: tuple[Streamed, ...]
    errors: tuple[str, ...]
    seconds: float


async def ask_endpoint(
    client: Client,
    model: str,
    sessions: Sequence[Session],
    *,
    max_tokens: int,
    at_once: int | None,
) -> Asked:
    """All conversations, so many at once, or for None each when it is due."""
    answers: list[Streamed] = []
    errors: list[str] = []
    free = asyncio.Semaphore(at_once or len(sessions))
    began = time.monotonic()

    async def talk(session: Session) -> None:
        if at_once is None:
            await asyncio.sleep(began + session.due - time.monotonic())
        async with free:
            said = list(session.begin)
            for turn in session.turns:
                said += turn
                try:
                    answer = await client.complete(model, said, max_tokens)
                except (Refused, OSError, EOFError, ValueError) as error:
                    errors.append(f"{type(error).__name__}: {error}"[:200])
                    return
                answers.append(answer)
                said += answer.tokens

    await asyncio.gather(*map(talk, sessions))
    return Asked(tuple(answers), tuple(errors), time.monotonic() - began)


@dataclass
class _Talk:
    """A conversation with the engine, and what it has come to."""

    said: list[int]
    turns: list[tuple[int, ...]]
    handle: RequestHandle | None = None
    answer: Streamed | None = None


def ask_engine(
    engine: Engine, sessions: Sequence[Session], *, max_tokens: int, at_once: int
) -> Asked:
    """The same without an endpoint: one loop over `Engine.step`."""
    answers: list[Streamed] = []
    waiting = [_Talk(list(one.begin), list(one.turns)) for one in reversed(sessions)]
    active: list[_Talk] = []
    began = time.monotonic()
    while waiting or active:
        while waiting and len(active) < at_once:
            active.append(waiting.pop())
        for talk in active:
            if talk.handle is None:
                talk.said += talk.turns.pop(0)
                talk.answer = Streamed(time.monotonic())
                talk.handle = engine.submit(talk.said, SamplingParams(max_tokens, ignore_eos=True))
        engine.step()
        for talk in list(active):
            assert talk.handle is not None
            assert talk.answer is not None
            _note(talk.answer, talk.handle)
            if talk.handle.done:
                answers.append(talk.answer)
                talk.said += talk.answer.tokens
                talk.handle = None
                if not talk.turns:
                    active.remove(talk)
    return Asked(tuple(answers), (), time.monotonic() - began)


def _note(answer: Streamed, handle: RequestHandle) -> None:
    """Takes over what is new, as a caller who streams would."""
    tokens = handle.tokens
    if len(tokens) > len(answer.tokens):
        answer.last = time.monotonic()
        answer.first = answer.first or answer.last
        answer.tokens = list(tokens)
    if handle.done:
        answer.finish_reason = handle.finish_reason
        use = handle.prompt_use
        answer.prompt_tokens = len(handle.prompt)
        answer.cached_tokens = None if use is None else use.num_found
