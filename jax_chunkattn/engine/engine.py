"""The engine: continuous batching over one chunk pool, from requests to streams of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from jax_chunkattn.admission import (
    InvalidRequest,
    check_params,
    check_priority,
    check_prompt,
    check_sampling,
    check_stop_tokens,
    check_text,
    each_request,
)
from jax_chunkattn.backend import Backend, choose_backend
from jax_chunkattn.engine.core import Core
from jax_chunkattn.engine.device import Device
from jax_chunkattn.engine.handle import PinnedPrefix, RequestHandle, begun
from jax_chunkattn.engine.lock import FairLock
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.requests import (
    Completion,
    EngineClosed,
    Output,
    Phase,
    Pinned,
    Request,
    StreamEvent,
)
from jax_chunkattn.engine.rows import PlannedRows
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats, WarmUp
from jax_chunkattn.engine.text import TextStream, Tokenizer, open_stream
from jax_chunkattn.model_interface import DecoderModel
from jax_chunkattn.planner import PlannerOptions, bucket
from jax_chunkattn.pool import CacheConfig
from jax_chunkattn.prefill import CALL_TOKENS
from jax_chunkattn.prefix_tree import PrefixTree
from jax_chunkattn.sampling import SamplingParams, each_sample, fork_seed

Prompt = Sequence[int] | str
MIN_SLOTS = 16  # on the device: engines that run fewer at once can use one another's programs
REMEMBERED_POOLS = 4  # pools' worth of prefixes whose eviction is remembered, for the statistics


class Engine:
    """Decodes requests that come and go over one pool, sharing what their prompts have in common.

    Requests are served first come, first served, in turns: each turn computes a piece of the
    prompts that wait (`prefill_tokens` at most) and decodes `steps_per_call` tokens for every
    running row. What a request computed stays cached when it has left, its answer included, until
    the pool needs the room; then the least recently used goes first. When even running requests
    need chunks that are not there, the youngest gives way and is computed again later: its stream
    only pauses.

    The engine has no thread of its own: it advances while a caller waits for something (`generate`,
    a handle's `stream` or `result`) or calls `step`. All methods may be called from any thread.

    Args:
      model: any decoder with the interface of `jax_chunkattn.model_interface`.
      cache: size and dtype of the pool.
      tokenizer: anything with `encode` and `decode`; needed for text in streams, for prompts that
        are strings, and for stop strings.
      stop_tokens: ids that end any request, unless its `ignore_eos` is set; 16 at most.
      max_running: most requests decoded at once.
      steps_per_call: tokens decoded for each row in one call to the device, K.
      prefill_tokens: most prompt tokens computed between two decode calls: one of
        `jax_chunkattn.prefill.CALL_TOKENS`. Fewer disturb running rows less.
      prefill_first: True lets nobody decode while there are prompts to compute and there is room
        for them. Best for a batch that is there as a whole; where requests keep coming, running
        rows would wait for all that come.
      sharing: False gives every request chunks of its own, as a server without a prefix cache.
      retain: False frees chunks when their last sequence leaves, as the paper does.
      implementation: of attention when decoding; None picks the best that runs here.
      planner: how attention work is cut; None fits it to the implementation and the device.

    Raises:
      ValueError: for a bad option, or an implementation that cannot run here.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: CacheConfig,
        *,
        tokenizer: Tokenizer | None = None,
        stop_tokens: Sequence[int] = (),
        max_running: int = 64,
        steps_per_call: int = 8,
        prefill_tokens: int = CALL_TOKENS[-1],
        prefill_first: bool = False,
        sharing: bool = True,
        retain: bool = True,
        implementation: str | None = None,
        planner: PlannerOptions | None = None,
    ):
        for name, value in (("max_running", max_running), ("steps_per_call", steps_per_call)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if prefill_tokens not in CALL_TOKENS:
            raise ValueError(f"prefill_tokens must be one of {CALL_TOKENS}, got {prefill_tokens}")
        stop_tokens = check_stop_tokens(stop_tokens, model)
        self.model = model
        self.cache = cache
        self.backend: Backend = choose_backend(
            model.cache_spec, cache, implementation=implementation, planner=planner
        )
        self._tokenizer = tokenizer
        self._sharing = sharing
        self._stats = EngineStats(bytes_per_chunk=cache.bytes_per_chunk(model.cache_spec))
        chunk_size, num_chunks = cache.chunk_size, cache.chunks_for(model.cache_spec)
        device = Device(
            model,
            cache,
            self.backend,
            self._stats,
            num_slots=bucket(max_running, MIN_SLOTS),
            stop_tokens=stop_tokens,
        )
        self._core = Core(
            device,
            Scheduler(PrefixTree(num_chunks, chunk_size, retain=retain), max_running=max_running),
            PlannedRows(self.backend.planner, self._stats, device.most_columns),
            PrefixMemory(chunk_size, REMEMBERED_POOLS * num_chunks),
            self._stats,
            steps_per_call=steps_per_call,
            prefill_tokens=prefill_tokens,
            prefill_first=prefill_first,
            stop_tokens=stop_tokens,
        )
        self._lock = FairLock()
        self._arrivals = count()
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Requests.

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        *,
        salt: str = "",
        priority: int = 0,
        hold: bool = False,
        on_event: Callable[[StreamEvent], None] | None = None,
    ) -> RequestHandle:
        """Queues one request.

        Args:
          prompt: token ids, or text if the engine has a tokenizer.
          params: how its tokens are chosen; `n` must be 1, see `submit_samples`.
          salt: requests of different salts share nothing. Give each tenant one: whether a prompt is
            answered faster tells what others have asked.
          priority: smaller numbers are served first, whenever they came.
          hold: keep its chunks when it has finished, so that forks of it are cheap, until `release`
            or until the pool runs short.
          on_event: called with each event, in the thread that advances the engine. If it raises,
            the request ends with that error.

        Raises:
          InvalidRequest: for a prompt or parameters that this engine can never serve.
          PoolExhausted: when the pool can never hold it.
          EngineClosed: after `close`. Nothing has changed in all three cases.
        """
        with self._lock:
            request = self._check(prompt, params, salt, priority, hold)
            if params.n != 1:
                raise InvalidRequest(f"submit starts one, n is {params.n}: use submit_samples")
            request.on_event = on_event
            self._accept(request)
        return RequestHandle(self, request)

    def submit_samples(
        self, prompt: Prompt, params: SamplingParams, *, salt: str = "", priority: int = 0
    ) -> list[RequestHandle]:
        """Queues `params.n` samples of one prompt, with the seeds `seed`, `seed + 1`, ...

        The prompt is computed once; the others are forked from the first when it is. Raises what
        `submit` raises.
        """
        check_sampling(params, "the prompt")
        with self._lock:
            first, *others = [
                self._check(prompt, one, salt, priority, hold=False) for one in each_sample(params)
            ]
            self._accept(first)
            for other in others:
                if self._sharing:
                    self._core.scheduler.accepted[other] = None
                    first.siblings.append(other)
                    self._stats.submitted += 1
                else:
                    self._accept(other)
        return [RequestHandle(self, request) for request in (first, *others)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        salt: str = "",
    ) -> Iterator[Output]:
        """The answers to `prompts` in their order, each as soon as it and all before it are there.

        A text alone is one prompt. All are queued before this returns. Leaving the iteration early,
        be it before the first answer, aborts what is not finished.

        Raises:
          InvalidRequest, PoolExhausted: as `submit`, naming the prompt; none has been queued then.
          RequestFailed: from the iterator, when an error ended a request.
        """
        requests = each_request(prompts, params)
        with self._lock:
            for index, (prompt, one) in enumerate(requests):
                self._check(prompt, one, salt, index=index)
            handles = [self.submit_samples(prompt, one, salt=salt) for prompt, one in requests]
        return begun(self._outputs(handles))

    def pin(self, prompt: Prompt, *, salt: str = "") -> PinnedPrefix:
        """Computes a prefix, for instance a system prompt, and keeps it until it is released.

        Only whole chunks are pinned. It waits for its turn like a request.

        Raises:
          InvalidRequest: for a bad prompt, or one shorter than a chunk.
          PoolExhausted: when the pool can never hold it beside what has been accepted and pinned.
          EngineClosed: after `close`.
        """
        with self._lock:
            self._require_open()
            tokens = self._tokens(prompt)
            whole = len(tokens) // self.cache.chunk_size * self.cache.chunk_size
            if not whole:
                raise InvalidRequest(
                    f"a prefix of {len(tokens)} tokens fills no chunk of {self.cache.chunk_size}: "
                    "nothing to pin"
                )
            order = (0, next(self._arrivals))
            pinned = Pinned(tokens[:whole], self._salt(salt), order)
            self._core.scheduler.require_fit(pinned)
            self._core.scheduler.pinned[pinned] = None
            self._core.scheduler.enqueue(pinned)
        return PinnedPrefix(self, pinned)

    # Running.

    def warm_up(self, *, threads: int = 4) -> WarmUp:
        """Compiles every program that any work can come to need, and runs none of them.

        Without it programs are compiled when they are first needed. On a GPU they are then as small
        as they can be; after it calls have few and generous shapes, and requests that share in
        unusually many places are decoded without sharing: `stats.plan_decision` says so.

        Args:
          threads: that compile at once.

        Raises:
          ValueError: for fewer than one.
          EngineClosed: after `close`.
        """
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        began = time.perf_counter()
        with self._lock:
            self._require_open()
            compiled = self._core.warm_up(threads)
        return WarmUp(compiled, time.perf_counter() - began)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._core.has_work

    def step(self) -> bool:
        """Advances all requests by a turn, or a part of one; False when there is nothing to do.

        Raises:
          RequestFailed: when the pool could not be rebuilt after an error: all requests fail then.
          EngineClosed: after `close`.
        """
        with self._lock:
            self._require_open()
            if self._core.has_work:
                self._core.advance()
            return self._core.has_work

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass

    def reset(self) -> None:
        """Forgets all that is cached or pinned, for instance after the model's weights changed.

        Requests that run go on with what they have, and leave nothing behind in the cache.
        """
        with self._lock:
            scheduler = self._core.scheduler
            for pinned in list(scheduler.pinned):
                scheduler.unpin(pinned)
            for request in list(scheduler.held):
                scheduler.drop_held(request)
            scheduler.tree.reset()
            self._core.memory.forget()

    def close(self) -> None:
        """Ends everything: streams that wait raise `RequestFailed`. Harmless when done twice."""
        with self._lock:
            if not self._closed:
                self._core.shut_down(EngineClosed("the engine was closed"))
                self._closed = True

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters, with the sizes as they are now."""
        with self._lock:
            scheduler = self._core.scheduler
            tree = scheduler.tree
            return replace(
                self._stats,
                running=len(scheduler.running),
                waiting=sum(isinstance(work, Request) for work in scheduler.accepted)
                - len(scheduler.running),
                held=len(scheduler.held),
                pinned=len(scheduler.pinned),
                chunks_in_use=tree.in_use_count,
                chunks_cached=tree.cached_count,
                chunks_free=tree.free_count,
                preemptions=scheduler.preemptions,
                evictions=self._stats.evictions + tree.num_evicted,
            )

    def check(self) -> None:
        """Verifies every invariant of tree and scheduler; AssertionError names the first broken."""
        with self._lock:
            self._core.check()

    # Inside, for handles and searches.

    def _require_servable(self, prompt: Prompt, params: SamplingParams, salt: str) -> None:
        """Raises what `submit` would."""
        with self._lock:
            self._check(prompt, params, salt)

    def _tokens(self, prompt: Prompt, name: str = "the prompt") -> tuple[int, ...]:
        return check_prompt(self._encode(prompt, name), self.model, name)

    def _encode(self, prompt: Prompt, name: str) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise InvalidRequest("a prompt that is text needs an engine with a tokenizer")
        check_text(prompt, name)
        return self._tokenizer.encode(prompt)

    def _salt(self, salt: str) -> bytes:
        """Unshared requests get a salt that no text is: it is not UTF-8."""
        encoded = check_text(salt, "the salt")
        if self._sharing:
            return encoded
        return b"\xff%d" % next(self._arrivals)

    def _check(
        self,
        prompt: Prompt,
        params: SamplingParams,
        salt: str,
        priority: int = 0,
        hold: bool = False,
        *,
        index: int | None = None,
    ) -> Request:
        """The request, checked, with nothing changed."""
        self._require_open()
        name = "the prompt" if index is None else f"prompt {index}"
        tokens = self._tokens(prompt, name)
        check_params(params, len(tokens), self.model, name)
        stream = self._text_stream(params, name)
        order = (check_priority(priority), next(self._arrivals))
        request = Request(tokens, self._salt(salt), order, params, stream, hold=hold)
        self._core.scheduler.require_fit(request)
        return request

    def _text_stream(self, params: SamplingParams, name: str) -> TextStream | None:
        try:
            return open_stream(self._tokenizer, params.stop)
        except ValueError as error:
            raise InvalidRequest(f"{name}: {error}") from None

    def _accept(self, request: Request) -> None:
        self._core.scheduler.enqueue(request)
        self._stats.submitted += 1

    def _require_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine was closed")

    def _outputs(self, handles: list[list[RequestHandle]]) -> Generator[Any]:
        try:
            yield None  # to `begun`
            for index, samples in enumerate(handles):
                completions = tuple(handle.result() for handle in samples)
                yield Output(index, samples[0].prompt, completions)
        finally:
            for samples in handles:
                for handle in samples:
                    handle.abort()

    def _next_event(self, request: Request) -> StreamEvent | None:
        """The next unread event; None when the last has been read."""
        while True:
            with self._lock:
                if request.events:
                    return request.events.popleft()
                if request.phase is Phase.DONE:
                    request.raise_error()
                    return None
                self._step_for(request)

    def _wait(self, request: Request) -> Completion:
        while True:
            with self._lock:
                if request.phase is Phase.DONE:
                    request.raise_error()
                    return request.completion()
                self._step_for(request)

    def _step_for(self, request: Request) -> None:
        if not self.step() and request.phase is not Phase.DONE:
            raise RuntimeError("a request is unfinished and the engine has nothing to do")

    def _abort(self, request: Request) -> None:
        with self._lock:
            self._core.abort(request)

    def _fork(
        self, parent: Request, params: SamplingParams | None, next_token: int | None, hold: bool
    ) -> RequestHandle:
        with self._lock:
            self._require_open()
            self._core.drain()
            child = self._child_of(parent, params, next_token, hold)
            self._core.scheduler.require_fit(child)
            parent.num_forks += 1
            self._core.fork_sequence(parent, child)
            self._accept(child)
        return RequestHandle(self, child)

    def _child_of(
        self, parent: Request, params: SamplingParams | None, next_token: int | None, hold: bool
    ) -> Request:
        if params is None:
            params = replace(parent.params, seed=fork_seed(parent.params.seed, parent.num_forks))
        check_params(params, len(parent.prompt), self.model, "the fork")
        if params.n != 1:
            raise InvalidRequest(f"fork starts one, n is {params.n}: fork as often")
        tokens = list(parent.tokens)
        if next_token is not None:
            if not tokens:
                raise InvalidRequest("next_token replaces the last chosen token; there is none yet")
            check_prompt([next_token], self.model, "next_token")
            tokens[-1] = next_token
        elif parent.finish_reason == "stop":
            raise InvalidRequest("the request has stopped: a fork needs a next_token to go on with")
        if len(tokens) >= params.max_tokens:
            raise InvalidRequest(
                f"the fork begins with {len(tokens)} chosen tokens, max_tokens is "
                f"{params.max_tokens}: it must be larger"
            )
        order = (parent.order[0], next(self._arrivals))
        child = Request(parent.prompt, parent.salt, order, params, hold=hold, tokens=tokens)
        child.logprobs = parent.logprobs_for_fork(params, next_token)
        child.text_stream = self._text_stream(params, "the fork")
        if child.text_stream is not None:
            piece = child.text_stream.push(tokens)
            if piece.stopped_after is not None:
                raise InvalidRequest("the fork begins with a text that has a stop string in it")
            child.text = piece.text
        return child

    def _let_go(self, request: Request) -> None:
        with self._lock:
            request.hold = False
            self._core.scheduler.drop_held(request)

    def _is_computed(self, pinned: Pinned) -> bool:
        with self._lock:
            return pinned.phase is Phase.DONE and pinned.sequence is not None

    def _unpin(self, pinned: Pinned) -> None:
        with self._lock:
            if pinned in self._core.scheduler.pinned:
                self._core.scheduler.unpin(pinned)
