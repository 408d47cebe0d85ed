"""The engine: continuous batching over one chunk pool, from requests to streams of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import Float

from jax_chunkattn.device.backend import Backend, choose_backend
from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.device import Device, ResizedPool
from jax_chunkattn.device.invocations import Invocations
from jax_chunkattn.device.mesh import lay_over
from jax_chunkattn.device.model_interface import DecoderModel, for_serving
from jax_chunkattn.engine.admission import (
    InvalidRequest,
    ModelSizes,
    RequestLimits,
    check_stop_tokens,
    each_request,
)
from jax_chunkattn.engine.core import Core
from jax_chunkattn.engine.handle import Outputs, PinnedPrefix, RequestHandle
from jax_chunkattn.engine.incoming import Incoming, Prompt
from jax_chunkattn.engine.learned_prefix import LearnedPrefix
from jax_chunkattn.engine.misses import PrefixMemory
from jax_chunkattn.engine.outputs import Score, StreamEvent
from jax_chunkattn.engine.requests import Request
from jax_chunkattn.engine.rows import PlannedRows
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.service import Service
from jax_chunkattn.engine.stats import EngineStats, WarmUp
from jax_chunkattn.engine.tails import Tails
from jax_chunkattn.engine.text import Tokenizer
from jax_chunkattn.engine.tiered import open_residency
from jax_chunkattn.engine.virtual_tokens import VirtualTokens, check_prefix
from jax_chunkattn.planning.planner import PlannerOptions, bucket
from jax_chunkattn.planning.prefill import CALL_TOKENS
from jax_chunkattn.planning.prefill_round import call_costs
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.tree.kv_events import KVEvents
from jax_chunkattn.tree.prefix_tree import PrefixTree
from jax_chunkattn.tree.view import MOST_VIEWED, TreeView, view_tree
from pallas_kernels.codecs import CodecError
from pallas_kernels.implementations import (
    BATCH_INVARIANT,
    COMPILED_HERE,
    ImplementationError,
)
from pallas_kernels.plans import HostOrDevice

CALLS_AHEAD = 4  # decode calls that a row may have room for behind what is known of it
MIN_SLOTS = 16  # on the device: engines that run fewer at once can use one another's programs
REMEMBERED_POOLS = 4  # pools' worth of prefixes whose eviction is remembered, for the statistics

Params = ParamSpec("Params")
Result = TypeVar("Result")


def in_turn(
    method: Callable[Concatenate[Engine, Params], Result],
) -> Callable[Concatenate[Engine, Params], Result]:
    """A method of the engine that uses its core, and so waits for its turn."""

    @wraps(method)
    def run(engine: Engine, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        return engine._service.turns.run(partial(method, engine, *args, **kwargs))

    return run


class Engine:
    """Decodes requests that come and go over one pool, sharing what their prompts have in common.

    Requests are served first come, first served, in turns: each turn computes a piece of the
    prompts that wait (`prefill_tokens` at most) and decodes `steps_per_call` tokens for every
    running row. What a request computed stays cached when it has left, its answer included, until
    the pool needs the room; then the least recently used goes first. When even running requests
    need chunks that are not there, the youngest gives way and is computed again later: its stream
    only pauses.

    The engine has no thread of its own: it advances while a caller waits for something (`generate`,
    a handle's `stream` or `result`) or calls `step`. All methods may be called from any thread, and
    from callbacks. A signal's handler, or a finaliser, that interrupts the engine at work may
    abort, release and prune requests, `close` and read `stats`; the rest raises RuntimeError there.
    Ctrl-C may come at any time: what it breaks off is computed again.

    The engine keeps the arrays that the model has when the engine is made: whatever is done to the
    model, it sees new weights by `update_weights` only. A trainer must not donate these arrays, or
    delete them, before that: it closes the engine, with an error that says so.

    Args:
      model: any decoder with the interface of `jax_chunkattn.DecoderModel`; its weights as they are
        now.
      cache: size and dtype of the pool.
      tokenizer: anything with `encode` and `decode`; needed for text in streams, for prompts that
        are strings, and for stop strings.
      stop_tokens: ids that end any request, unless its `ignore_eos` is set; 16 at most.
      max_running: most requests decoded at once.
      steps_per_call: tokens decoded for each row in one call to the device, K.
      prefill_tokens: most prompt tokens computed between two decode calls: one of
        `jax_chunkattn.planning.prefill.CALL_TOKENS`. Fewer disturb running rows less. One call
        computes them, or on a CPU several smaller ones where that takes less time
        (`jax_chunkattn.planning.prefill_round`).
      prefill_first: True lets nobody decode while there are prompts to compute and there is room
        for them. Best for a batch that is there as a whole; where requests keep coming, running
        rows would wait for all that come.
      sharing: False gives every request chunks of its own, as a server without a prefix cache.
      retain: False frees chunks when their last sequence leaves, as the paper does.
      implementation: of attention when decoding; None picks the best that runs here. With "xla" the
        model's products are XLA's too.
      deterministic: True gives every token, and every log-probability, the same bits whatever else
        is computed with it, in whatever order, and whatever was cached: on one machine, and for
        one model and cache. On CPUs, with the compiled kernel; with windows, and codecs that the
        kernel reads. Not with a selector or clusters.
      planner: how attention work is cut; None fits it to the implementation and the device.
      limits: what one request may ask for at most.
      kv_events: is told which chunks are cached and which are not any longer, for routers.
      mesh: devices that share model and pool, which lie over its axis `tp`: see
        `jax_chunkattn.device.mesh`. The model must have been laid over it before, as `models.load`
        does. Not with a selector, clusters or `deterministic` on more than one.

    Raises:
      ValueError: for a bad option, an implementation that cannot run here, a codec that cannot
        store the model's keys and values (`CodecError`), or a mesh that cannot split the model
        (`MeshError`). Also for tiers that are too small for a chunk, on a mesh, or where nothing is
        cached (`TierError`).
      OSError: when the folder of a `disk` cannot be had.
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
        deterministic: bool = False,
        planner: PlannerOptions | None = None,
        limits: RequestLimits = RequestLimits(),
        kv_events: KVEvents | None = None,
        mesh: Mesh | None = None,
    ):
        if deterministic:
            if implementation not in (None, BATCH_INVARIANT):
                raise ImplementationError(
                    f"attention by {implementation!r} is not deterministic: {BATCH_INVARIANT!r} is"
                )
            implementation = BATCH_INVARIANT
        for name, value in (("max_running", max_running), ("steps_per_call", steps_per_call)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if prefill_tokens not in CALL_TOKENS:
            raise ValueError(f"prefill_tokens must be one of {CALL_TOKENS}, got {prefill_tokens}")
        sizes = ModelSizes(model.vocab_size, model.max_positions)
        stop_tokens = check_stop_tokens(stop_tokens, sizes)
        cache = cache.for_model(model.cache_spec)
        laid = lay_over(mesh, model, cache, deterministic=deterministic)
        if implementation is None or implementation in COMPILED_HERE:
            model = for_serving(model, batch_invariant=deterministic)
        self.cache = cache
        self.backend: Backend = choose_backend(
            model.cache_spec, cache, implementation=implementation, planner=planner, mesh=laid
        )
        self.limits = limits
        self._spec = model.cache_spec
        spec, num_slots = model.cache_spec, bucket(max_running, MIN_SLOTS)
        exact, chunk_size = not cache.whole_chunks, cache.chunk_size
        if not exact and chunk_size > prefill_tokens:
            raise CodecError(
                "a codec, selector or clusters need chunks that one prefill call can fill: "
                f"{chunk_size} tokens are more than the {prefill_tokens} of prefill_tokens"
            )
        self._with_window_room = partial(
            CacheConfig.with_window_room,
            spec=spec,
            rows=max_running,
            num_slots=num_slots,
            ahead=max(CALLS_AHEAD * steps_per_call, chunk_size),
            call=prefill_tokens,
        )
        cache, window_room = self._with_window_room(cache)
        num_chunks = cache.chunks_for(spec)
        self._stats = EngineStats(
            codec=cache.codec_name,
            clusters=None if cache.clusters is None else cache.clusters.counts,
            selector="all" if cache.selector is None else cache.selector.name,
        )
        invocations = Invocations(
            model,
            cache.without_tiers(),
            self.backend,
            num_slots=num_slots,
            stop_tokens=stop_tokens,
            window_room=window_room,
            mesh=laid,
        )
        device = Device(invocations)
        self._residency = open_residency(
            self.cache,
            device,
            caches=sharing and retain,
            seconds_per_token=lambda: (
                device.counters.prefill_seconds / max(self._stats.prefill_tokens, 1)
            ),
        )
        observers = [*([] if kv_events is None else [kv_events]), *self._residency.observers]
        tree = PrefixTree(
            num_chunks, chunk_size, retain=retain, window_room=window_room, observers=observers
        )
        self._core = Core(
            device,
            Scheduler(tree, max_running=max_running, exact=exact),
            PlannedRows(
                self.backend.planner,
                self._stats,
                invocations.most_columns,
                model.cache_spec.different_windows,
                tables_beyond=cache.tables_beyond,
            ),
            PrefixMemory(
                chunk_size,
                REMEMBERED_POOLS * num_chunks,
                last_tokens=1 if exact else chunk_size,
            ),
            self._stats,
            Tails(chunk_size) if cache.copies_tails else None,
            self._residency,
            steps_per_call=steps_per_call,
            prefill_tokens=prefill_tokens,
            call_costs=call_costs(self.backend.planner),
            prefill_first=prefill_first,
            stop_tokens=stop_tokens,
        )
        incoming = Incoming(sizes, tokenizer, limits, sharing=sharing)
        self._service = Service(self._core, incoming, sharing=sharing)

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
        chosen: Sequence[int] = (),
        prefix: str | None = None,
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
          chosen: tokens of its answer that another engine has chosen. The request goes on behind
            them, as that one would have: `max_tokens`, penalties, random numbers and stop strings
            count them. Events are of what is new.
          prefix: the name of a learned prefix that the prompt comes behind; see `add_prefix`.
          on_event: called with each event, in the thread that advances the engine. If it raises,
            the request ends with that error.

        Raises:
          InvalidRequest: for a prompt or parameters that this engine can never serve.
          PoolExhausted: when the pool can never hold it.
          EngineClosed: after `close`. Nothing has changed in all three cases.
        """
        self._service.require_open()
        samples = self._service.incoming.samples(
            prompt, params, salt, priority=priority, hold=hold, chosen=chosen, prefix=prefix
        )
        if len(samples) != 1:
            raise InvalidRequest(f"submit starts one, n is {params.n}: use submit_samples")
        samples[0].on_event = on_event
        handle = RequestHandle(self._service, samples[0])
        self._service.queue([samples])
        return handle

    def submit_samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        salt: str = "",
        priority: int = 0,
        prefix: str | None = None,
        on_event: Callable[[int, StreamEvent], None] | None = None,
    ) -> list[RequestHandle]:
        """Queues `params.n` samples of one prompt, with seeds as `SamplingParams` says.

        The prompt is computed once; the others are forked from the first when it is. `on_event` is
        called as that of `submit`, with the sample's index before the event; `prefix` is as there.
        Raises what `submit` raises.
        """
        self._service.require_open()
        samples = self._service.incoming.samples(
            prompt, params, salt, priority=priority, prefix=prefix
        )
        if on_event is not None:
            for index, sample in enumerate(samples):
                sample.on_event = partial(on_event, index)
        handles = [RequestHandle(self._service, sample) for sample in samples]
        self._service.queue([samples])
        return handles

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        salt: str = "",
        prefix: str | None = None,
        in_order: bool = True,
        enough: int | None = None,
    ) -> Outputs:
        """The answers to `prompts` in their order, each as soon as it and all before it are there.

        A text alone is one prompt. All are queued before this returns. Leaving the iteration early,
        even before the first answer, aborts what is not finished when the engine is next used.

        Args:
          prefix: the name of a learned prefix that all prompts come behind; see `add_prefix`.
          in_order: False gives each prompt's answers as soon as they are there, whichever prompt's
            that is; `Output.index` tells.
          enough: of how many samples of a prompt the answers suffice: when so many have ended, the
            others are aborted, with the tokens that they have. That is seen to while the iterator
            is waited for, not while the engine advances for others alone. None waits for all.

        Raises:
          InvalidRequest, PoolExhausted: as `submit`, naming the prompt; none has been queued then.
            `InvalidRequest` too when a prompt has fewer samples than are `enough`.
          RequestFailed: from the iterator, when an error ended a request.
        """
        self._service.require_open()
        requests = [
            self._service.incoming.samples(prompt, one, salt, prefix=prefix, name=f"prompt {index}")
            for index, (prompt, one) in enumerate(each_request(prompts, params))
        ]
        for index, samples in enumerate(requests):
            if enough is not None and not 1 <= enough <= len(samples):
                raise InvalidRequest(
                    f"prompt {index}: enough must be from 1 to its {len(samples)} samples, got "
                    f"{enough}"
                )
        # If it never gets to the caller, it aborts them.
        outputs = Outputs(self._service, requests, in_order=in_order, enough=enough)
        self._service.queue(requests, numbered=True)
        return outputs

    def score(
        self,
        prefix: Prompt,
        continuations: Sequence[Prompt],
        *,
        top: int = 0,
        salt: str = "",
        learned: str | None = None,
    ) -> list[Score]:
        """How likely the model finds each of these continuations of a prefix.

        The log-probabilities are those of the model's own distribution, of each token behind all
        that comes before it. The prefix is computed once, or found in the cache, and so is what
        continuations have in common; each token is read in the same way whatever else is scored.
        Logits are there for a few tokens at a time.

        Args:
          prefix: token ids or text, at least one token: what follows nothing has no probability.
          continuations: token ids or text, each of at least one token. Text is tokenized by itself.
          top: how many of the likeliest tokens are reported in the place of each.
          salt: as for `submit`.
          learned: the name of a learned prefix that `prefix` comes behind; see `add_prefix`.

        Raises:
          InvalidRequest: for tokens that this engine can never score.
          PoolExhausted: when the pool can never hold the prefix with a continuation.
          RequestFailed: when an error ended it, or logits were no numbers.
          EngineClosed: after `close`.
        """
        [scores] = self.score_batch([(prefix, continuations)], top=top, salt=salt, learned=learned)
        return scores

    def score_batch(
        self,
        queries: Sequence[tuple[Prompt, Sequence[Prompt]]],
        *,
        top: int = 0,
        salt: str = "",
        learned: str | None = None,
    ) -> list[list[Score]]:
        """The same of several prefixes, each with continuations of its own, computed together.

        Raises what `score` raises; nothing has been queued then, but by RequestFailed.
        """
        self._service.require_open()
        scored = self._service.incoming.scored
        return self._service.score(
            [
                scored(prefix, continuations, salt, top, f"prefix {index}", learned)
                for index, (prefix, continuations) in enumerate(queries)
            ]
        )

    def pin(self, prompt: Prompt, *, salt: str = "", prefix: str | None = None) -> PinnedPrefix:
        """Computes a prefix, for instance a system prompt, and keeps it until it is released.

        Only whole chunks are pinned. It waits for its turn like a request. `prefix` is the name of
        a learned one that it comes behind; see `add_prefix`.

        Raises:
          InvalidRequest: for a bad prompt, one shorter than a chunk, or one longer than the model
            has positions for.
          PoolExhausted: when the pool can never hold it beside what has been accepted and pinned.
          EngineClosed: after `close`.
        """
        self._service.require_open()
        pinned = self._service.incoming.pinned(prompt, salt, self.cache.chunk_size, prefix)
        handle = PinnedPrefix(self._service, pinned)
        self._service.pin(pinned)
        return handle

    def add_prefix(
        self,
        name: str,
        keys: Float[HostOrDevice, "L Hkv m D"],
        values: Float[HostOrDevice, "L Hkv m D"],
        *,
        after: str | None = None,
    ) -> LearnedPrefix:
        """Keeps keys and values that no token has, for requests to come behind: a learned prefix.

        So are prefix tuning and Control Prefixes served; `models.prefixes` reads what Hugging
        Face's peft has trained. A request that gives the name as its `prefix` reads these m virtual
        tokens as the first of its sequence: its prompt begins at position m. They are stored once,
        as other chunks are, and read once for all who share them; any number of prefixes may be in
        a batch. Nothing but positions counts them: not prompts, answers, penalties or statistics.

        The engine keeps a copy on the host, and writes it again where the pool has lost it: after
        errors, `reset` and `update_weights`. New weights change nothing of what was given here: who
        has trained another prefix for them adds that. Requests of different salts share nothing, so
        each salt has its own copy in the pool; that of no salt stays there until it is released.

        Args:
          name: by which requests ask for it.
          keys, values: of L layers, Hkv KV heads, m tokens and D numbers of a head. They are read
            as they are, by queries rotated for their positions: no rotation is applied. m must be a
            multiple of the cache's `chunk_size`.
          after: the name of another learned prefix that this one comes behind, so that all which
            come behind that share it.

        Raises:
          InvalidPrefix: for arrays that do not fit the model, the chunks or the cache, or a name
            that is taken.
          InvalidRequest: for an unknown `after`, or more than the model has positions for.
          PoolExhausted: when the pool can never hold it beside what has been accepted and pinned.
          EngineClosed: after `close`. Nothing has changed in all these cases.
        """
        self._service.require_open()
        incoming, size = self._service.incoming, self.cache.chunk_size
        arrays = check_prefix(name, keys, values, self._spec, self.cache)
        virtual = VirtualTokens.of(name, *arrays, size, incoming.virtual(after))
        learned = incoming.learned(virtual)
        handle = LearnedPrefix(self._service, learned)
        self._service.add_prefix(learned)
        return handle

    def check_request(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        *,
        salt: str = "",
        prefix: str | None = None,
    ) -> None:
        """Raises what `submit_samples` would, and queues nothing."""
        self._service.require_open()
        samples = self._service.incoming.samples(prompt, params, salt, prefix=prefix)
        self._service.require_room([samples])

    # Running.

    @in_turn
    def warm_up(self, *, threads: int = 4, scores: bool = False) -> WarmUp:
        """Compiles every program that any work can come to need, and runs none of them.

        Without it programs are compiled when they are first needed. On a GPU they are then as small
        as they can be; after it calls have few and generous shapes, and requests that share in
        unusually many places are decoded without sharing: `stats.plan_decision` says so.

        Args:
          threads: that compile at once.
          scores: those of `score` too.

        Raises:
          ValueError: for fewer than one.
          EngineClosed: after `close`.
        """
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._service.require_open()
        began = time.perf_counter()
        compiled = self._core.warm_up(threads, scores=scores)
        return WarmUp(compiled, time.perf_counter() - began)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._service.turns.has_left or self._core.has_work

    @in_turn
    def step(self) -> bool:
        """Advances all requests by a turn, or a part of one; False when there is nothing to do.

        Raises:
          RequestFailed: when the pool could not be rebuilt after an error: all requests fail then.
          EngineClosed: after `close`.
        """
        self._service.require_open()
        return self._core.advance()

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass

    @in_turn
    def reset(self) -> None:
        """Forgets all that is cached, held or pinned.

        Requests that run go on with what they have, and leave nothing behind in the cache. The
        weights stay; `update_weights` is for new ones. Learned prefixes stay too, until they are
        released.
        """
        self._core.forget_cached()

    def update_weights(
        self, weights: Any, *, running: Literal["recompute", "finish"] = "recompute"
    ) -> None:
        """Serves new weights from now on, by the programs that are compiled.

        Nothing that was computed by the old ones is read any more: the cache is empty, and pinned
        prefixes are computed again. Each `Completion` says by which `weights` its tokens were
        chosen. The values are copied, one array after another: a trainer may donate its own.

        Args:
          weights: a model of the same architecture, its NNX state, or any tree of arrays whose
            paths are the same, such as a checkpoint's: of JAX's or NumPy's, in any float type.
            `models.stored_weights` reads them from files, one after another.
          running: "recompute" has requests that run go on by the new weights: the keys and values
            of their tokens are computed again. "finish" lets them come to their end by the old ones
            first, while nobody else begins; this returns when they have.

        Raises:
          InvalidWeights: when they do not fit; the old ones are served.
          EngineClosed: after `close`, or when an array could not be had in the midst of it, for
            want of memory or of a file, which closes the engine. When that was the first, the
            largest, its own error is raised and the old weights are served.
        """
        if running not in ("recompute", "finish"):
            raise ValueError(f"running must be 'recompute' or 'finish', got {running!r:.60}")
        self._service.update_weights(weights, finish=running == "finish")

    def resize(self, *, memory: int | str | None = None, num_chunks: int | None = None) -> None:
        """Another size of the pool, while requests run: to give memory back, or take more.

        Nothing is lost. What is computed goes to the tiers behind the pool, if `cache` has some,
        and is brought back for who needs it; else that is computed again. Programs for the new size
        are compiled when they are first needed, or by `warm_up`.

        Args:
          memory, num_chunks: one of them, as `CacheConfig` has them.

        Raises:
          ValueError: for a size that is none.
          PoolExhausted: when what is accepted and pinned would not fit.
          InvalidPrefix: when heads with windows would come to have chunks of their own, and there
            are learned prefixes.
          EngineClosed: after `close`. Nothing has changed in all these cases.
        """
        size = replace(self.cache, memory=memory, num_chunks=num_chunks)

        def make() -> tuple[ResizedPool, PrefixTree]:
            cache, window_room = self._with_window_room(size)
            assert cache.num_chunks is not None, "found for the model"
            tree = self._core.tree.resized(cache.num_chunks, window_room)
            return self._core.device.resized(cache.without_tiers(), window_room), tree

        def resized() -> None:
            self.cache = size

        self._service.resize(make, resized)

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The arrays that are served now, by name, not copied: nobody must donate or delete them.

        Names are those that `update_weights` knows, such as `blocks.qkv`.
        """
        return self._service.turns.run(lambda: self._core.device.weights)

    def close(self) -> None:
        """Ends everything: streams that wait raise `RequestFailed`. Harmless when done twice."""
        self._service.close()

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters, with the sizes as they are now."""
        turns = self._service.turns
        return self._read_stats() if turns.interrupted else turns.run(self._read_stats)

    @in_turn
    def view_tree(self, most: int = MOST_VIEWED) -> TreeView:
        """What the prefix tree holds, as it is now: see `jax_chunkattn.tree.view`.

        Raises ValueError when `most` is below 1.
        """
        return view_tree(self._core.scheduler.tree, most)

    @in_turn
    def check(self) -> None:
        """Verifies every invariant of tree and scheduler; AssertionError names the first broken."""
        self._core.check()

    def _read_stats(self) -> EngineStats:
        scheduler = self._core.scheduler
        tree = scheduler.tree
        counters = self._core.device.counters
        cache, spec, window_room = self.cache, self._spec, tree.window_room
        windowed_bytes = cache.windowed_bytes(spec) if window_room is not None else 0
        return replace(
            self._stats,
            bytes_per_chunk=cache.bytes_per_chunk(spec) - windowed_bytes,
            bytes_per_window_chunk=windowed_bytes,
            window_chunks=window_room.chunks if window_room is not None else 0,
            calls=counters.calls,
            compilations=counters.compilations,
            compile_seconds=counters.compile_seconds,
            prefill_seconds=counters.prefill_seconds,
            decode_seconds=counters.decode_seconds,
            window_chunks_in_use=tree.window_in_use_count,
            reads=counters.reads,
            tiers=self._residency.stats,
            running=len(scheduler.running),
            waiting=sum(isinstance(work, Request) for work in scheduler.accepted)
            - len(scheduler.running),
            held=len(scheduler.held),
            pinned=len(scheduler.pinned),
            learned_prefixes=len(self._service.incoming.prefixes),
            chunks_in_use=tree.in_use_count,
            chunks_cached=tree.cached_count,
            chunks_free=tree.free_count,
            preemptions=scheduler.preemptions,
            evictions=self._stats.evictions + tree.num_evicted,
        )
