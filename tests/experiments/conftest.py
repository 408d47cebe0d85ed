"""A stand-in for the decode session, and measurements made up for the tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jax_chunkattn import PrefixTree, Request


class FakeSession:
    """Decodes one token a step; request i stops after i + 1 tokens. `interrupt_at` is a step."""

    interrupt_at: int | None = None

    def __init__(self, model: Any, cache: Any, **settings: Any) -> None:
        self.settings = settings
        self.backend = SimpleNamespace(decode=settings["implementation"] or "xla")
        self.requests: list[Request] = []
        self.released: list[Request] = []
        self.steps = 0
        self.stats = SimpleNamespace(
            plan_decision="shared",
            shared_tokens=64,
            prefill_tokens_computed=100,
            prefill_tokens_reused=300,
            decode_tokens=0,
            compile_seconds=0.25,
            prefill_seconds=2.0,
            decode_seconds=0.0,
            kv_bytes_held=1000,
            kv_bytes_unshared=4000,
        )

    def add(self, prompts: Sequence[Sequence[int]], sampling: Any, **_: Any) -> Sequence[Request]:
        tree = PrefixTree(num_chunks=len(prompts), chunk_size=2)
        self.requests = [
            Request(tuple(prompt), params, tree.insert([1]))
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        return self.requests

    def step(self) -> list[Request]:
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        finished = []
        for index, request in enumerate(self.requests):
            if request.finish_reason is None:
                request.tokens.append(self.steps)
                self.stats.decode_tokens += 1
                self.stats.decode_seconds += 0.5
                if len(request.tokens) == index + 1:
                    request.finish_reason = "stop"
                    finished.append(request)
        return finished

    def release(self, request: Request) -> None:
        self.released.append(request)


@pytest.fixture
def fake_session(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """Puts a fresh `FakeSession` class in the place of `DecodeSession`."""
    from experiments import decoding

    session = type("Session", (FakeSession,), {})
    monkeypatch.setattr(decoding, "DecodeSession", session)
    return session


@pytest.fixture
def make_measured() -> Callable[..., Any]:
    """Builds a `Measured` of a shared run of 32 requests; keyword arguments replace fields."""
    from experiments.decoding import Measured

    measured = Measured(
        batch=32,
        sharing=True,
        implementation="xla",
        plan_decision="shared",
        shared_tokens=2048,
        prefill_tokens_computed=1000,
        prefill_tokens_reused=3000,
        decode_tokens=600,
        compile_seconds=9.0,
        prefill_seconds=2.0,
        decode_seconds=5.0,
        first_answer_seconds=12.0,
        kv_bytes_held=1 << 20,
        kv_bytes_unshared=1 << 23,
        compilations=7,
        compilations_from_cache=2,
        max_rss_bytes=1 << 30,
        answers=((1, 2), (3, 4)),
    )
    return lambda **changes: replace(measured, **changes)
