"""Running a batch through `jax_chunkattn.DecodeSession`, and what is measured of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.compilations import count_compilations
from experiments.environment import max_rss_bytes
from experiments.interrupts import deferred_interrupts
from jax_chunkattn import (
    CacheConfig,
    DecodeSession,
    Progress,
    Request,
    SamplingParams,
    chunks_needed,
)
from jax_chunkattn.requests import OnProgress

OnFinished = Callable[[int, Request], None]
"""Called with a request and its index in the batch."""


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class SessionSettings:
    """How a session decodes; the fields are those of `DecodeSession` and `CacheConfig`."""

    chunk_size: int
    dtype: str
    sharing: bool
    implementation: str | None
    steps_per_call: int
    stop_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What one run of a batch did. Seconds of prefill and decode are free of compilation."""

    batch: int
    sharing: bool
    implementation: str
    plan_decision: str
    shared_tokens: int
    prefill_tokens_computed: int
    prefill_tokens_reused: int
    decode_tokens: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    first_answer_seconds: float
    kv_bytes_held: int
    kv_bytes_unshared: int
    compilations: int
    compilations_from_cache: int
    max_rss_bytes: int
    answers: tuple[tuple[int, ...], ...]

    @property
    def prompt_tokens(self) -> int:
        return self.prefill_tokens_computed + self.prefill_tokens_reused

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed a second."""
        return _rate(self.prefill_tokens_computed, self.prefill_seconds)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens made ready a second, whether computed or reused."""
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        return _rate(self.decode_tokens, self.decode_seconds)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    settings: SessionSettings,
    *,
    on_progress: OnProgress = _ignore,
    on_finished: OnFinished = _ignore,
) -> Measured:
    """Answer all `prompts` together.

    `on_finished` hears of each request as it finishes; when the run is interrupted, also of those
    that have not, with what they have so far.
    """
    started = time.perf_counter()
    with count_compilations() as compilations, deferred_interrupts() as check_interrupt:
        session = _session(model, prompts, sampling, settings)
        reporter = _Reporter(started, on_finished)

        def progressed(progress: Progress) -> None:
            on_progress(progress)
            check_interrupt()

        requests = session.add(prompts, sampling, on_progress=progressed)
        try:
            reporter.start(requests)
            total = sum(params.max_tokens for params in sampling)
            while reporter.unfinished:
                session.step()
                reporter.report_finished()
                left = sum(request.remaining for request in requests)
                progressed(Progress("decode", total - left, total))
        except KeyboardInterrupt:
            reporter.report_unfinished()
            raise
        for request in requests:
            session.release(request)
    stats = session.stats
    return Measured(
        batch=len(prompts),
        sharing=settings.sharing,
        implementation=session.backend.decode,
        plan_decision=stats.plan_decision,
        shared_tokens=stats.shared_tokens,
        prefill_tokens_computed=stats.prefill_tokens_computed,
        prefill_tokens_reused=stats.prefill_tokens_reused,
        decode_tokens=stats.decode_tokens,
        compile_seconds=stats.compile_seconds,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=stats.decode_seconds,
        first_answer_seconds=reporter.first_answer_seconds,
        kv_bytes_held=stats.kv_bytes_held,
        kv_bytes_unshared=stats.kv_bytes_unshared,
        compilations=compilations.compiled,
        compilations_from_cache=compilations.from_cache,
        max_rss_bytes=max_rss_bytes(),
        answers=tuple(tuple(request.tokens) for request in requests),
    )


class _Reporter:
    """Tells each request once: when it has finished, or at last when it will not."""

    def __init__(self, started: float, on_finished: OnFinished) -> None:
        self.unfinished: dict[int, Request] = {}
        self.first_answer_seconds = math.nan
        self._started = started
        self._on_finished = on_finished

    def start(self, requests: Sequence[Request]) -> None:
        self.unfinished = dict(enumerate(requests))
        self.report_finished()

    def report_finished(self) -> None:
        for index, request in list(self.unfinished.items()):
            if request.finish_reason is not None:
                if math.isnan(self.first_answer_seconds):
                    self.first_answer_seconds = time.perf_counter() - self._started
                self._on_finished(index, self.unfinished.pop(index))

    def report_unfinished(self) -> None:
        for index, request in self.unfinished.items():
            self._on_finished(index, request)


def _session(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    settings: SessionSettings,
) -> DecodeSession:
    num_chunks = chunks_needed(
        prompts,
        max(params.max_tokens for params in sampling),
        chunk_size=settings.chunk_size,
        sharing=settings.sharing,
    )
    return DecodeSession(
        model,
        CacheConfig(num_chunks=num_chunks, chunk_size=settings.chunk_size, dtype=settings.dtype),
        sharing=settings.sharing,
        implementation=settings.implementation,
        steps_per_call=settings.steps_per_call,
        stop_tokens=settings.stop_tokens,
    )
