"""Running a batch through `jax_chunkattn.Engine`, and what is measured of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from experiments.harness.chunk_reads import reads_record
from experiments.harness.compilations import count_compilations
from experiments.harness.environment import max_rss_bytes
from experiments.harness.interrupts import deferred_interrupts
from experiments.harness.reading import Record
from experiments.prefix_option import NAME
from jax_chunkattn import (
    CacheConfig,
    Engine,
    InvalidRequest,
    PoolExhausted,
    RequestFailed,
    RequestHandle,
    SamplingParams,
    chunks_needed,
)
from models.prefixes import PrefixArrays
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.codecs import ChunkCodec
from pallas_kernels.selection import ChunkSelector

OnFinished = Callable[[int, RequestHandle], None]
"""Called with a request and its index in the batch."""


@dataclass(frozen=True)
class Progress:
    """How far a batch is: `done` of `total`, prompts in phase "prefill", tokens in "decode"."""

    phase: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class BatchSettings:
    """How a batch is decoded; the fields are those of `Engine` and `CacheConfig`."""

    chunk_size: int
    codec: str | ChunkCodec
    selector: ChunkSelector | None
    clusters: HeadClusters | None
    dtype: str
    sharing: bool
    implementation: str | None
    steps_per_call: int
    stop_tokens: tuple[int, ...]
    deterministic: bool = False
    mesh: Mesh | None = None
    prefix: PrefixArrays | None = None  # that all prompts come behind


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
    reads: Record | None = None  # see `reads_record`; None where all is read

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
    settings: BatchSettings,
    *,
    names: Sequence[str],
    on_progress: OnProgress = _ignore,
    on_finished: OnFinished = _ignore,
) -> Measured:
    """Answer all `prompts` together.

    `on_finished` gets each request as it finishes; when the run is interrupted, also those that
    have not finished, with the tokens they have so far.

    Args:
        names: what each prompt is called in errors.

    Raises:
        InvalidRequest, PoolExhausted: the engine cannot serve a prompt, which is named.
        RequestFailed: an error ended a request, which is named.
    """
    started = time.perf_counter()
    with (
        count_compilations() as compilations,
        deferred_interrupts() as check_interrupt,
        _engine(model, prompts, sampling, settings) as engine,
    ):
        handles, prefix = [], settings.prefix
        if prefix is not None:
            engine.add_prefix(NAME, prefix.keys, prefix.values)
        behind = None if prefix is None else NAME
        for name, prompt, params in zip(names, prompts, sampling, strict=True):
            with _named(name):
                handles.append(engine.submit(prompt, params, prefix=behind))
        reporter = _Reporter(started, handles, names, on_finished)
        try:
            while reporter.unfinished:
                engine.step()
                reporter.report_finished()
                on_progress(_progress(handles))
                check_interrupt()
        except KeyboardInterrupt:
            reporter.report_unfinished()
            raise
    stats = engine.stats
    return Measured(
        batch=len(prompts),
        sharing=settings.sharing,
        implementation=engine.backend.decode,
        plan_decision=stats.plan_decision,
        shared_tokens=stats.shared_tokens,
        prefill_tokens_computed=stats.prefill_tokens,
        prefill_tokens_reused=sum(map(len, prompts)) - stats.prefill_tokens,
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
        answers=tuple(handle.tokens for handle in handles),
        reads=reads_record(stats),
    )


@contextmanager
def _named(prompt: str) -> Iterator[None]:
    """Errors in the block are of this prompt, and say so."""
    try:
        yield
    except (InvalidRequest, PoolExhausted) as error:
        raise type(error)(f"prompt {prompt}: {error}") from error


def _raise_failure(prompt: str, error: BaseException | None) -> None:
    """Raise what ended a request in the midst of the run."""
    with _named(prompt):
        if isinstance(error, InvalidRequest | PoolExhausted):
            raise error
        raise RequestFailed(f"prompt {prompt}: the request failed: {error}") from error


def _progress(handles: Sequence[RequestHandle]) -> Progress:
    """Prompts ready, until all are; then tokens chosen."""
    ready = sum(bool(handle.tokens) for handle in handles)
    if ready < len(handles):
        return Progress("prefill", ready, len(handles))
    total = sum(handle.params.max_tokens for handle in handles)
    left = sum(
        handle.params.max_tokens - len(handle.tokens) for handle in handles if not handle.done
    )
    return Progress("decode", total - left, total)


class _Reporter:
    """Tells each request once: when it has finished, or at last when it will not."""

    def __init__(
        self,
        started: float,
        handles: Sequence[RequestHandle],
        names: Sequence[str],
        on_finished: OnFinished,
    ) -> None:
        self.unfinished = dict(enumerate(handles))
        self.first_answer_seconds = math.nan
        self._started = started
        self._names = names
        self._on_finished = on_finished

    def report_finished(self) -> None:
        for index, handle in list(self.unfinished.items()):
            if handle.done:
                if handle.finish_reason == "error":
                    _raise_failure(self._names[index], handle.error)
                if math.isnan(self.first_answer_seconds):
                    self.first_answer_seconds = time.perf_counter() - self._started
                self._on_finished(index, self.unfinished.pop(index))

    def report_unfinished(self) -> None:
        for index, handle in self.unfinished.items():
            self._on_finished(index, handle)


def _engine(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    settings: BatchSettings,
) -> Engine:
    num_chunks = chunks_needed(
        prompts,
        max(params.max_tokens for params in sampling),
        chunk_size=settings.chunk_size,
        sharing=settings.sharing,
    )
    if settings.prefix is not None:
        copies = 1 if settings.sharing else 1 + len(prompts)
        num_chunks += copies * -(-settings.prefix.num_tokens // settings.chunk_size)
    return Engine(
        model,
        CacheConfig(
            num_chunks,
            settings.chunk_size,
            settings.dtype,
            codec=settings.codec,
            selector=settings.selector,
            clusters=settings.clusters,
        ),
        max_running=len(prompts),
        sharing=settings.sharing,
        implementation=settings.implementation,
        deterministic=settings.deterministic,
        mesh=settings.mesh,
        steps_per_call=settings.steps_per_call,
        prefill_first=True,  # so that all rows decode together
        stop_tokens=settings.stop_tokens,
    )
