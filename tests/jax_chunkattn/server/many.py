"""Many clients at once: plain ones, in one event loop, that read streams or break them off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.load.client import Client
from tests.jax_chunkattn.server.endpoints import MODEL, Running


@dataclass
class Mix:
    """Prompts that share, of which each has one right answer.

    Attributes:
      answers: by prompt, as the engine gives them.
    """

    prompts: list[tuple[int, ...]]
    max_tokens: list[int]
    answers: list[tuple[int, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, number: int, seed: int = 0) -> Mix:
        random = np.random.default_rng(seed)
        heads = [random.integers(0, 256, 40).tolist() for _ in range(3)]
        prompts = [
            (*heads[at % 3][: 8 + 32 * (at % 2)], *random.integers(0, 256, 1 + at % 20).tolist())
            for at in range(number)
        ]
        return cls(prompts, [int(count) for count in random.integers(1, 24, number)])


async def read_streams(found: Running, mix: Mix, clients: int, seconds: float) -> int:
    """So many clients, each asking again and again for so long; how many streams they read, each
    of which was whole and right."""
    end, read = time.monotonic() + seconds, 0

    async def one(number: int) -> None:
        nonlocal read
        client = Client(f"{found.url}/v1")
        at = number
        while time.monotonic() < end or at == number:
            index = at % len(mix.prompts)
            answer = await client.complete(MODEL, mix.prompts[index], mix.max_tokens[index])
            assert tuple(answer.tokens) == mix.answers[index], index
            assert answer.finish_reason == "length"
            assert answer.prompt_tokens == len(mix.prompts[index])
            read += 1
            at += clients + 1
        await client.close()

    await asyncio.gather(*map(one, range(clients)))
    return read


async def break_off(
    found: Running, mix: Mix, clients: int, seconds: float, seed: int = 1
) -> tuple[int, int]:
    """Clients that go at random points: before all was sent, at once, or behind some bytes; how
    many went, and how many read to the end."""
    end = time.monotonic() + seconds
    gone = whole = 0

    async def one(number: int) -> None:
        nonlocal gone, whole
        random = np.random.default_rng((seed, number))
        first = True
        while time.monotonic() < end or first:
            first = False
            if await _try_one(found, mix, random):
                whole += 1
            else:
                gone += 1

    await asyncio.gather(*map(one, range(clients)))
    return gone, whole


async def _try_one(found: Running, mix: Mix, random: np.random.Generator) -> bool:
    """Whether it read to the end."""
    body = _body(mix, random)
    reader, writer = await asyncio.open_connection(*found.address)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        sent = head.encode() + body
        how = random.integers(5)
        if how == 0:
            sent = sent[: random.integers(1, len(sent))]
        writer.write(sent)
        await writer.drain()
        if how == 0 and random.integers(2):
            writer.write_eof()
            return not await reader.read()
        if how == 1:
            await asyncio.sleep(random.exponential(0.02))
            return False
        if how == 2:
            await reader.read(int(random.integers(1, 4000)))
            return False
        if how == 3:
            writer.transport.abort()
            return False
        if how == 4:
            said = await reader.read()
            assert said.startswith(b"HTTP/1.1 200"), said[:300]
            assert b'"finish_reason":"length"' in said
            return True
        return False
    finally:
        writer.close()


def _body(mix: Mix, random: np.random.Generator) -> bytes:
    at: Sequence[int] = random.integers(0, len(mix.prompts), 1 + int(random.integers(2))).tolist()
    asked = {
        "model": MODEL,
        "prompt": [mix.prompts[index] for index in at],
        "max_tokens": int(random.integers(1, 60)),
        "n": 1 + int(random.integers(3)),
        "stream": bool(random.integers(2)),
    }
    if not random.integers(8):
        asked |= {"echo": True, "logprobs": 1}
    return json.dumps(asked).encode()
