"""The engine driven at random, its answers held against a model without a cache.

Requests share beginnings, fork, wait, give way, are aborted in the middle or left by their
consumers, in pools from just large enough to ample; see `oracle` for what they must answer.

    pytest -s --hypothesis-profile=long tests/jax_chunkattn/engine/test_engine_machine.py

goes on for 20,000 steps, some minutes, and prints what was seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from jax_chunkattn import (
    Beam,
    BestFirst,
    InvalidRequest,
    NextTokens,
    PoolExhausted,
    Puct,
    RequestFailed,
    SamplingParams,
    TokenLogprobs,
    tree_search,
)
from jax_chunkattn.engine.admission import chunks_to_finish
from jax_chunkattn.sampling import each_sample, fork_seed
from models.decoder import Decoder
from tests.jax_chunkattn.engine.behind import BehindPrefix, prefix_of
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine
from tests.jax_chunkattn.engine.machine_requests import (
    LONG,
    LONGEST_PROMPT,
    PARAMS,
    PROMPTS,
    SALTS,
    STEPS,
    STOP_TOKENS,
    SUFFIXES,
    TEXTS,
    CallbackError,
    Listener,
    Tracked,
    TrackedPin,
    prefixes,
)
from tests.jax_chunkattn.engine.oracle import Agreement, ending, text_of
from tests.jax_chunkattn.machines import run_until_seen
from tests.jax_chunkattn.toy import (
    mesh_of,
    reweighted,
    toy_model,
    toy_model_on,
    windowed_model,
)

PREFIX = prefix_of(16, 5)
MOST_OPEN = 8
MOST_DONE = 8
MOST_STEPS = 1_000  # of the engine, for `MOST_OPEN` requests to end
POOLS = [(10, 16)]  # chunks and their size; each compiles programs of its own
MORE_POOLS = [*POOLS, (24, 16), (40, 4)]
COMMON = {
    "aborted in decode",
    "aborted in waiting",
    "callback raised",
    "engine refused nonsense",
    "evicted",
    "fork copied",
    "fork recomputed",
    "fork refused",
    "partial chunk copied",
    "pinned",
    "preempted",
    "pruned a fork",
    "scored",
    "searched",
    "stop string",
    "stop token",
    "stream left",
}
RARE = {
    "aborted in prefill",
    "aborted with siblings",
    "forked in a callback",
    "held lost",
    "held released",
    "held late",
    "late error",
    "pin refused",
    "pruned a held fork",
    "request refused",
    "reset with requests active",
    "samples forked",
    "stepped in a callback",
    "twins",
    "weights replaced, finish",
    "weights replaced, recompute",
}


def pick(data: st.DataObject, some: list):
    """One of them, drawn as an index, which prints shorter."""
    return some[data.draw(st.integers(0, len(some) - 1))]


def agreements_of(model: Decoder) -> tuple[Agreement, Agreement]:
    """With a model, and with another of other weights."""
    return Agreement(model), Agreement(reweighted(model))


class EngineMachine(RuleBasedStateMachine):
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()
    agreements: ClassVar[tuple[Agreement, Agreement]]
    pools: ClassVar[list[tuple[int, int]]] = POOLS
    options: ClassVar[Mapping[str, Any]] = {}
    virtual: ClassVar[int] = 0  # chunks of a learned prefix, which the pool has besides

    @property
    def caches(self) -> bool:
        """Whether the options are for engines that share and retain."""
        return "host_memory" in self.options

    @initialize(data=st.data(), sharing=st.sampled_from([True] * 7 + [False]))
    def start(self, data: st.DataObject, sharing: bool) -> None:
        num_chunks, self.chunk_size = pick(data, self.pools)
        self.num_chunks = num_chunks
        self.sharing = sharing or self.caches
        self.engine: Any = make_engine(
            num_chunks + self.virtual,
            self.chunk_size,
            steps_per_call=3,
            prefill_tokens=32,
            max_running=data.draw(st.sampled_from([4, 3, 1])),
            tokenizer=BytePairs(),
            stop_tokens=STOP_TOKENS,
            sharing=self.sharing,
            retain=data.draw(st.sampled_from([True] * 7 + [False])) or self.caches,
            **self.options,
        )
        if self.virtual:
            self.engine = BehindPrefix(self.engine, PREFIX)
        self.version = 0  # of the weights: even ones are the model's, odd ones the others
        self.requests: list[Tracked] = []
        self.pins: list[TrackedPin] = []
        self.counts: Counter[str] = Counter()  # what the engine's statistics must say
        self.before = self.engine.stats
        self.fill(data.draw(st.integers(0, num_chunks // 2)))

    def saw(self, event: str, times: int = 1) -> None:
        if times > 0:
            self.seen[event] += times

    def open(self) -> list[Tracked]:
        return [tracked for tracked in self.requests if not tracked.handle.done]

    def may_submit(self) -> bool:
        return len(self.open()) < MOST_OPEN

    @property
    def agreement(self) -> Agreement:
        """With the weights that are served."""
        return self.agreements[self.version % 2]

    def track(self, handle, namespace, listener=None, hold=False) -> Tracked:
        tracked = Tracked(handle, namespace, listener, hold, version=self.version)
        self.requests.append(tracked)
        self.counts["submitted"] += 1
        return tracked

    # What can ever fit, said plainly.

    def namespace(self, salt: str) -> object:
        return salt if self.sharing else object()

    def fits(self, tokens, max_tokens: int, namespace: object, pinned: set) -> bool:
        own = self.chunks_of(tokens, namespace)
        needed = chunks_to_finish(len(tokens), max_tokens, self.chunk_size)
        needed += len(self.copies_of_prefix(namespace))
        return needed <= self.num_chunks - len(pinned - own) and self.windows_fit()

    def chunks_of(self, tokens, namespace: object) -> set:
        """What names each whole chunk, those of a prefix's copy too."""
        own = prefixes(tokens, self.chunk_size, namespace)
        return own | self.copies_of_prefix(namespace)

    def copies_of_prefix(self, namespace: object) -> set:
        """Other salts than none have a copy of their own, beside the one that is pinned."""
        return {(namespace, at) for at in range(self.virtual) if namespace != ""}

    def windows_fit(self, pins: int = 0) -> bool:
        """Whether heads with windows have room for a request, beside what is pinned and so many
        prefixes more."""
        room = self.engine._core.tree.window_room
        sequences = len(self.pins) + pins + 1
        return room is None or room.needed(sequences, self.chunk_size) <= room.chunks

    def pinned(self) -> set:
        each = (self.chunks_of(pin.tokens, pin.namespace) for pin in self.pins)
        return set().union(*each)

    # Requests come.

    def submit_one(
        self, prompt, params, salt, listener=None, *, priority=0, hold=False
    ) -> Tracked | None:
        namespace = self.namespace(salt)
        tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
        fits = self.fits(tokens, params.max_tokens, namespace, self.pinned())
        try:
            handle = self.engine.submit(
                prompt, params, salt=salt, priority=priority, hold=hold, on_event=listener
            )
        except PoolExhausted:
            assert not fits
            self.saw("request refused")
            return None
        assert fits
        if any(other.handle.prompt == handle.prompt for other in self.open()):
            self.saw("twins")
        return self.track(handle, namespace, listener, hold)

    @precondition(may_submit)
    @rule(prompt=PROMPTS, params=PARAMS, salt=SALTS, hold=st.booleans(), steps=STEPS)
    def submit(self, prompt, params, salt, hold, steps) -> None:
        self.submit_one(prompt, params, salt, hold=hold)
        self.step(steps)

    @precondition(may_submit)
    @rule(prompts=st.lists(PROMPTS, min_size=3, max_size=4), params=LONG, steps=STEPS)
    def submit_several(self, prompts, params, steps) -> None:
        """Together they may grow too long for the pool."""
        for prompt in prompts:
            self.submit_one(prompt, params, "")
        self.step(4 * steps)

    @precondition(may_submit)
    @rule(
        prompt=PROMPTS | TEXTS,
        params=PARAMS,
        salt=SALTS,
        priority=st.integers(-1, 1),
        at=st.integers(1, 3),
        act=st.sampled_from(["raise", "leave", "abort", "fork", "submit", "step", "raise"]),
        steps=STEPS,
    )
    def submit_with_callback(self, prompt, params, salt, priority, at, act, steps) -> None:
        """Callbacks may do all that any caller may, and raise."""

        def on_event(index: int) -> None:
            assert tracked is not None
            if index != at:
                return
            if act == "raise":
                self.saw("callback raised")
                raise CallbackError
            if act == "leave":
                self.abort_one(tracked)
            elif act == "abort":
                self.abort_one(self.requests[0])
            elif act == "fork" and self.may_submit():
                self.saw("forked in a callback")
                self.fork_one(tracked, None, None)
            elif act == "submit" and self.may_submit():
                self.submit_one(tracked.handle.prompt, params, salt)
            elif act == "step":
                self.saw("stepped in a callback")
                self.engine.step()

        listener = Listener(on_event)
        tracked = self.submit_one(prompt, params, salt, listener, priority=priority)
        self.step(2 * steps)

    @precondition(lambda self: self.requests and self.may_submit())
    @rule(data=st.data(), suffix=SUFFIXES, params=PARAMS, steps=STEPS)
    def next_turn(self, data, suffix, params, steps) -> None:
        """A prompt that continues another request, as far as that has come."""
        handle = pick(data, self.requests).handle
        prompt = [*handle.prompt, *handle.tokens, *suffix]
        self.submit_one(prompt[:LONGEST_PROMPT], params, "")
        self.step(steps)

    @precondition(may_submit)
    @rule(prompt=PROMPTS, params=PARAMS, n=st.integers(2, 3), priority=st.integers(-1, 1))
    def submit_samples(self, prompt, params, n, priority) -> None:
        params = replace(params, n=n)
        namespaces = [self.namespace("") for _ in range(n)]
        pinned = self.pinned()
        fits = all(self.fits(prompt, params.max_tokens, each, pinned) for each in namespaces)
        try:
            handles = self.engine.submit_samples(prompt, params, priority=priority)
        except PoolExhausted:
            assert not fits
            return self.saw("request refused")
        assert fits
        for index, handle in enumerate(handles):
            assert handle.params == each_sample(params)[index]
        first, *others = map(self.track, handles, namespaces)
        first.siblings = others if self.sharing else []

    @precondition(lambda self: self.requests and self.may_submit())
    @rule(
        data=st.data(),
        params=st.none() | PARAMS,
        next_token=st.none() | st.sampled_from([*STOP_TOKENS, *b"ab", 200]),
        hold=st.booleans(),
        steps=STEPS,
        twice=st.booleans(),
    )
    def fork(self, data, params, next_token, hold, steps, twice) -> None:
        self.step(steps)
        running = [one for one in self.open() if one.handle.state == "decode"]
        parent = pick(data, running or self.requests)
        self.fork_one(parent, params, next_token, hold=hold)
        if twice:
            self.fork_one(parent, params, next_token, hold=hold)

    @precondition(lambda self: self.requests and self.may_submit())
    @rule(data=st.data(), params=PARAMS)
    def fork_any(self, data, params) -> None:
        self.fork_one(pick(data, self.requests), params, None)

    def fork_one(self, parent: Tracked, params, next_token, hold: bool = False) -> None:
        before = self.engine.stats.forks
        asked = params
        if params is None:
            assert parent.handle.params.seed is not None
            seed = fork_seed(parent.handle.params.seed, parent.num_forks)
            params = replace(parent.handle.params, seed=seed)
        try:
            handle = parent.handle.fork(asked, next_token=next_token, hold=hold)
        except InvalidRequest:
            self.saw("fork refused")
            assert self.has_no_next(parent, params, next_token)
            return
        except PoolExhausted:
            self.saw("fork refused")
            pinned = self.pinned()
            prompt, most = parent.handle.prompt, params.max_tokens
            assert not self.fits(prompt, most, parent.namespace, pinned)
            return
        assert not self.has_no_next(parent, params, next_token)
        parent.num_forks += 1
        assert handle.params == params
        assert handle.prompt == parent.handle.prompt
        given = list(parent.handle.tokens)
        if next_token is not None:
            given[-1] = next_token
        assert list(handle.tokens) == given
        assert text_of(given).startswith(handle.text)
        copied = self.engine.stats.forks - before
        self.counts["forks"] += copied
        self.saw("fork copied" if copied else "fork recomputed")
        self.track(handle, parent.namespace, hold=hold).parent = parent

    def has_no_next(self, parent: Tracked, params, next_token) -> bool:
        tokens = list(parent.handle.tokens)
        if next_token is None:
            no_end_to_replace = parent.handle.finish_reason == "stop"
        else:
            no_end_to_replace = not tokens
            tokens[-1:] = [next_token]
        stopped = any(stop in text_of(tokens) for stop in params.stop)
        return no_end_to_replace or stopped or len(tokens) >= params.max_tokens

    # Time passes, and callers do what they like.

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            assert self.engine.step() == self.engine.has_work

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 2), leave=st.booleans())
    def read(self, data, count, leave) -> None:
        """Streams stay open, so that others go on in between, or are left."""
        tracked = pick(data, self.open() or self.requests)
        tracked.read_events(count)
        if leave and tracked.stream is not None:
            if not tracked.handle.done:
                self.saw("stream left")
                self.note_abort(tracked)
            tracked.leave_stream()
            assert tracked.handle.done

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def result(self, data) -> None:
        handle = pick(data, self.requests).handle
        try:
            completion = handle.result()
        except RequestFailed:
            assert handle.error is not None
        else:
            assert handle.error is None
            assert completion.tokens == handle.tokens
            assert completion.text == handle.text
            assert completion.logprobs == handle.logprobs
            assert completion.finish_reason == handle.finish_reason

    @precondition(lambda self: self.open())
    @rule(data=st.data(), steps=STEPS)
    def abort(self, data, steps) -> None:
        self.step(steps)
        started = [one for one in self.open() if one.handle.state == "prefill"]
        self.abort_one(pick(data, started or self.open() or self.requests))

    def abort_one(self, tracked: Tracked) -> None:
        reason = tracked.handle.finish_reason
        if not tracked.handle.done:
            self.note_abort(tracked)
        tracked.handle.abort()
        assert tracked.handle.finish_reason == (reason or "abort")

    def note_abort(self, tracked: Tracked) -> None:
        self.saw(f"aborted in {tracked.handle.state}")
        if tracked.siblings and tracked.handle.state != "decode":
            self.saw("aborted with siblings")

    @precondition(lambda self: any(tracked.parent for tracked in self.requests))
    @rule(data=st.data())
    def prune(self, data) -> None:
        """A request that has forks, or that had, or any."""
        parents = [tracked.parent for tracked in self.requests if tracked.parent is not None]
        root = pick(data, parents)
        family = [tracked for tracked in self.requests if tracked.descends_from(root)]
        for tracked in family:
            if not tracked.handle.done:
                self.note_abort(tracked)
                self.saw("pruned a fork", tracked is not root)
            self.saw("pruned a held fork", tracked.hold and tracked.verified)
        root.handle.prune()
        for tracked in family:
            assert tracked.handle.done
            tracked.hold = False

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def hold(self, data) -> None:
        tracked = pick(data, self.open() or self.requests)
        held = tracked.handle.hold()
        assert held == (tracked.hold if tracked.verified else True)
        self.saw("held late", held and not tracked.hold)
        tracked.hold = held

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data) -> None:
        held = [tracked for tracked in self.requests if tracked.hold]
        self.let_go(pick(data, held or self.requests))

    def let_go(self, tracked: Tracked) -> None:
        before = self.engine.stats.held
        tracked.handle.release()
        tracked.hold = False
        self.saw("held released", before - self.engine.stats.held)

    @rule(
        prompt=PROMPTS,
        continuations=st.lists(SUFFIXES, min_size=1, max_size=3),
        top=st.integers(0, 2),
        salt=SALTS,
        sometimes=st.integers(0, 1),
    )
    def score(self, prompt, continuations, top, salt, sometimes) -> None:
        """While requests are there, which go on meanwhile."""
        if sometimes:
            return
        pinned = self.pinned()
        fits = all(
            self.fits([*prompt, *some[:-1]], 1, self.namespace(salt), pinned)
            for some in continuations
        )
        try:
            scores = self.engine.score(prompt, continuations, top=top, salt=salt)
        except PoolExhausted:
            assert not fits
            return self.saw("score refused")
        assert fits
        self.saw("scored")
        for score, tokens in zip(scores, continuations, strict=True):
            assert score.tokens == tuple(tokens)
            params = SamplingParams(len(tokens), logprobs=top)
            self.agreement.check_logprobs(prompt, params, tokens, score.logprobs)

    @rule(
        prompt=PROMPTS,
        width=st.integers(1, 3),
        salt=SALTS,
        policy=st.sampled_from([Puct(), Puct(batch=2), BestFirst(), Beam(1)]),
        sometimes=st.integers(0, 1),
    )
    def search(self, prompt, width, salt, policy, sometimes) -> None:
        """While requests are there, which go on meanwhile; nothing is left of it."""
        if sometimes:
            return
        fits = self.fits(prompt, 4, self.namespace(salt), self.pinned())
        submitted = self.engine.stats.submitted - self.counts["submitted"]
        try:
            tree = tree_search(
                self.engine,
                prompt,
                expand=NextTokens(width),
                select=policy,
                num_simulations=4,
                max_tokens=4,
                salt=salt,
            )
        except PoolExhausted:
            assert not fits
            return self.saw("search refused")
        assert fits
        self.saw("searched")
        requests = self.engine.stats.submitted - self.counts["submitted"] - submitted
        self.counts["submitted"] += requests
        self.counts["length"] += requests
        for node in range(1, tree.num_nodes):
            tokens = tree.answer(node)
            logprobs = [TokenLogprobs(value) for value in tree.answer_logprobs(node)]
            params = SamplingParams(len(tokens), logprobs=0)
            self.agreement.check_logprobs(prompt, params, tokens, logprobs)

    @rule(tokens=PROMPTS, salt=SALTS, sometimes=st.integers(0, 2))
    def pin_sometimes(self, tokens, salt, sometimes) -> None:
        if not sometimes:
            self.pin(tokens, salt)

    def pin(self, tokens, salt) -> None:
        namespace = self.namespace(salt)
        whole = tokens[: len(tokens) // self.chunk_size * self.chunk_size]
        try:
            handle = self.engine.pin(tokens, salt=salt)
        except InvalidRequest:
            assert not whole
            self.saw("pin refused")
        except PoolExhausted:
            assert not self.pin_fits(whole, namespace)
            self.saw("pin refused")
        else:
            assert whole
            assert self.pin_fits(whole, namespace)
            assert handle.num_tokens == len(whole)
            self.pins.append(TrackedPin(handle, namespace, whole))
            self.saw("pinned")

    def pin_fits(self, tokens, namespace) -> bool:
        pinned = self.pinned() | self.chunks_of(tokens, namespace)
        accepted = [(tokens, 1, namespace)]
        accepted += [
            (one.handle.prompt, one.handle.params.max_tokens, one.namespace) for one in self.open()
        ]
        accepted += [(pin.tokens, 1, pin.namespace) for pin in self.pins if not pin.handle.computed]
        return self.windows_fit(1) and all(self.fits(*one, pinned=pinned) for one in accepted)

    def fill(self, count: int) -> None:
        """Makes the pool smaller, by pinning what nobody asks for."""
        if count:
            self.pin([255] * (count * self.chunk_size), "filler")

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data) -> None:
        pin = pick(data, self.pins)
        self.pins.remove(pin)
        pin.handle.release()
        pin.handle.release()

    @rule(sometimes=st.integers(0, 4), running=st.sampled_from(["recompute", "finish"]))
    def update_weights(self, sometimes: int, running) -> None:
        if sometimes:
            return
        begun = sum(bool(tracked.handle.tokens) for tracked in self.open())
        self.engine.update_weights(self.agreements[(self.version + 1) % 2].model, running=running)
        self.version += 1  # only now: what callbacks have forked meanwhile began by the old ones
        for tracked in self.open():
            tracked.changes.append(len(tracked.handle.tokens))
        self.saw(f"weights replaced, {running}", begun > 0)

    @rule(sometimes=st.integers(0, 5))
    def reset(self, sometimes: int) -> None:
        if sometimes:
            return
        refill = sum(len(pin.tokens) for pin in self.pins if pin.namespace == "filler")
        self.engine.reset()
        self.pins.clear()
        for tracked in self.requests:
            tracked.hold &= not tracked.verified
        stats = self.engine.stats
        assert (stats.held, stats.pinned, stats.chunks_cached) == (0, 0, 0)
        if stats.running:
            self.saw("reset with requests active")
        self.fill(refill // self.chunk_size)

    @rule(which=st.integers(0, 20))
    def submit_nonsense(self, which: int) -> None:
        if which > 9:
            return
        good, params = [1, 2, 3], SamplingParams(2)
        engine, too_many = self.engine, self.num_chunks * self.chunk_size
        call, error = [
            (lambda: engine.submit([], params), InvalidRequest),
            (lambda: engine.submit([256], params), InvalidRequest),
            (lambda: engine.submit(good, SamplingParams(2, n=2)), InvalidRequest),
            (lambda: engine.submit(good, SamplingParams(2, stop="\ufffd")), InvalidRequest),
            (lambda: engine.submit(good, SamplingParams(2, stop_token_ids=[300])), InvalidRequest),
            (lambda: engine.submit(good, SamplingParams(1022)), InvalidRequest),
            (lambda: engine.submit(good, SamplingParams(too_many)), PoolExhausted),
            (lambda: engine.submit_samples(good, SamplingParams(too_many, n=2)), PoolExhausted),
            (lambda: engine.generate([good, []], params), InvalidRequest),
            (lambda: engine.pin([7]), InvalidRequest),
        ][which]
        before = self.known()
        with pytest.raises((error, PoolExhausted)):  # all of the pool may be pinned
            call()
        assert self.known() == before
        self.saw("engine refused nonsense")

    def known(self) -> tuple[object, int]:
        """What the engine says of itself; chunks in tiers come and go by themselves."""
        return replace(self.engine.stats, tiers=None), self.engine._core.tree.version

    # What must hold.

    @invariant()
    def everything_holds(self) -> None:
        type(self).steps += 1
        self.engine.check()
        for tracked in self.requests:
            tracked.note_growth()
            if tracked.handle.done and not tracked.verified:
                self.verify(tracked)
        self.statistics_are_right()
        done = [tracked for tracked in self.requests if tracked.verified]
        for tracked in done[: max(0, len(done) - MOST_DONE)]:
            self.forget(tracked)

    def verify(self, tracked: Tracked) -> None:
        """Its end has come: all it answered must be right."""
        tracked.verified = True
        handle, given = tracked.handle, len(tracked.given)
        expected = ending(handle.tokens, handle.params, STOP_TOKENS, given)
        if handle.error is not None and not isinstance(handle.error, CallbackError):
            raise handle.error
        if handle.finish_reason in ("abort", "error"):
            assert expected is None, f"{handle} should have ended by {expected}"
            assert handle.error is not None or handle.finish_reason == "abort"
            assert text_of(handle.tokens).startswith(handle.text)
            tracked.hold = False
        else:
            assert expected == (handle.finish_reason, len(handle.tokens), handle.text)
            self.saw("late error", handle.error is not None)
        of = (handle.prompt, handle.params)
        for begin, end, version in tracked.spans:
            agreement = self.agreements[version % 2]
            if end > begin:
                agreement.check_tokens(*of, handle.tokens[:end], begin)
            agreement.check_logprobs(*of, handle.tokens[:end], handle.logprobs[:end], begin)
        if not given and expected is not None:
            weights = tuple(version for begin, end, version in tracked.spans if end > begin)
            assert handle.error is not None or handle.result().weights == weights
        self.counts[handle.finish_reason or ""] += 1
        self.saw(f"ended by {handle.finish_reason}")
        if expected and expected.reason == "stop":
            stopped_by_text = any(stop in text_of(handle.tokens) for stop in handle.params.stop)
            self.saw("stop string" if stopped_by_text else "stop token")

    def statistics_are_right(self) -> None:
        stats, before, counts = self.engine.stats, self.before, self.counts
        self.before = stats
        assert stats.recoveries == 0
        assert stats.submitted == counts["submitted"]
        assert stats.finished == counts["stop"] + counts["length"]
        assert stats.aborted == counts["abort"]
        assert stats.failed == counts["error"]
        assert stats.running + stats.waiting == len(self.open())
        assert stats.pinned == len(self.pins)
        held = [tracked for tracked in self.requests if tracked.verified and tracked.hold]
        still_held = self.engine._core.scheduler.held
        for tracked in held:
            if tracked.handle._request not in still_held:
                self.saw("held lost")
                tracked.hold = False
        assert stats.held == sum(tracked.hold for tracked in held)
        total = stats.chunks_free + stats.chunks_cached + stats.chunks_in_use
        assert total == self.num_chunks + self.virtual
        self.saw("preempted", stats.preemptions - before.preemptions)
        forked, self.counts["forks"] = self.counts["forks"], 0
        self.saw("samples forked", stats.forks - before.forks - forked)
        self.saw("evicted", stats.evictions - before.evictions)
        self.saw("partial chunk copied", stats.prompts.copied > before.prompts.copied)

    def forget(self, tracked: Tracked) -> None:
        """It must be complete for those who stream it late, too."""
        self.requests.remove(tracked)
        self.let_go(tracked)
        tracked.read_to_the_end()

    def teardown(self) -> None:
        """Aborts some of what is left, lets the rest end, and gives everything back."""
        if sys.exception() is not None or not hasattr(self, "engine"):
            return
        for tracked in self.open()[::3]:
            self.abort_one(tracked)
        for _ in range(MOST_STEPS):
            if not self.engine.step():
                break
        assert not self.engine.has_work, "some request never ends"
        self.everything_holds()
        for tracked in list(self.requests):
            self.forget(tracked)
        for pin in self.pins:
            assert pin.handle.computed
            pin.handle.release()
        if isinstance(self.engine, BehindPrefix):
            self.engine.learned.release()
            self.engine = self.engine.engine
        assert_all_returned(self.engine)


class WindowMachine(EngineMachine):
    """Heads with windows have chunks for three sequences at once."""

    seen: ClassVar[Counter[str]] = Counter()
    pools: ClassVar[list[tuple[int, int]]] = [(24, 16)]

    @invariant()
    def windows_count(self) -> None:
        if hasattr(self, "engine"):
            self.saw("window", self.engine.stats.prompts.window > 0)


class TieredMachine(EngineMachine):
    """What is evicted goes to memory for few chunks, and from there to a disk for not many more."""

    seen: ClassVar[Counter[str]] = Counter()

    @invariant()
    def chunks_come_back(self) -> None:
        tiers = self.engine.stats.tiers if hasattr(self, "engine") else None
        if tiers is not None:
            self.saw("loaded from memory", tiers.loaded_from_host > 0)
            self.saw("loaded from the disk", tiers.loaded_from_disk > 0)
            assert tiers.failures.keys() <= {"read: gone"}

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            self.engine.close()


class LearnedMachine(EngineMachine):
    """All requests come behind a learned prefix."""

    seen: ClassVar[Counter[str]] = Counter()
    virtual: ClassVar[int] = 1


class MeshMachine(EngineMachine):
    """Two devices have a KV head each; the test says so, in a process that has them."""

    seen: ClassVar[Counter[str]] = Counter()


def assert_agreed(agreements: Sequence[Agreement]) -> None:
    """But for a tie in 10,000 tokens; of fewer, such as a mesh's 2,600, one says nothing."""
    for agreement in agreements:
        print(agreement)
        assert agreement.near_ties <= max(1, agreement.tokens / 10_000)


@pytest.mark.slow
@pytest.mark.thorough
def test_random_use_of_windows_gives_the_answers_of_a_model_without_a_cache():
    WindowMachine.agreements = agreements_of(windowed_model())
    WindowMachine.options = {"model": windowed_model(), "window_chunks": 20}
    wanted = {"evicted", "fork copied", "partial chunk copied", "pinned", "window"}
    missed = run_until_seen(WindowMachine, wanted, max_examples=12, report_multiple_bugs=False)
    seen = WindowMachine.seen
    print(f"{WindowMachine.steps} steps, {dict(sorted(seen.items()))}")
    assert_agreed(WindowMachine.agreements)
    assert not missed, f"never happened in {WindowMachine.steps} steps: {missed}"


@pytest.mark.slow
def test_random_use_of_tiers_gives_the_answers_of_a_model_without_a_cache(tmp_path):
    """All engines find what those before them have left on the disk."""
    tiers = {"host_memory": "60KB", "disk": tmp_path, "disk_memory": "200KB", "load": "always"}
    TieredMachine.agreements = agreements_of(toy_model())
    TieredMachine.options = tiers
    wanted = {
        "evicted", "fork copied", "partial chunk copied", "pinned", "preempted", "scored",
        "loaded from memory", "loaded from the disk",
    }  # fmt: skip
    missed = run_until_seen(TieredMachine, wanted, max_examples=12, report_multiple_bugs=False)
    print(f"{TieredMachine.steps} steps, {dict(sorted(TieredMachine.seen.items()))}")
    assert_agreed(TieredMachine.agreements)
    assert not missed, f"never happened in {TieredMachine.steps} steps: {missed}"


@pytest.mark.slow
@pytest.mark.thorough
def test_random_use_behind_a_prefix_gives_the_answers_of_a_model_without_a_cache():
    models = toy_model(), reweighted(toy_model())
    LearnedMachine.agreements = Agreement(models[0], PREFIX), Agreement(models[1], PREFIX)
    wanted = {"evicted", "fork copied", "partial chunk copied", "pinned", "preempted", "scored"}
    missed = run_until_seen(LearnedMachine, wanted, max_examples=12, report_multiple_bugs=False)
    print(f"{LearnedMachine.steps} steps, {dict(sorted(LearnedMachine.seen.items()))}")
    assert_agreed(LearnedMachine.agreements)
    assert not missed, f"never happened in {LearnedMachine.steps} steps: {missed}"


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.devices(2)
def test_random_use_of_a_mesh_gives_the_answers_of_a_model_without_a_cache():
    MeshMachine.agreements = agreements_of(toy_model())
    MeshMachine.options = {"model": toy_model_on(2), "mesh": mesh_of(2)}
    wanted = {"evicted", "fork copied", "partial chunk copied", "pinned", "preempted", "scored"}
    missed = run_until_seen(MeshMachine, wanted, max_examples=8, report_multiple_bugs=False)
    print(f"{MeshMachine.steps} steps, {dict(sorted(MeshMachine.seen.items()))}")
    assert_agreed(MeshMachine.agreements)
    assert not missed, f"never happened in {MeshMachine.steps} steps: {missed}"


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(8, marks=pytest.mark.slow),
        pytest.param(20, marks=[pytest.mark.slow, pytest.mark.thorough]),
    ],
)
def test_random_use_gives_the_answers_of_a_model_without_a_cache(examples):
    thorough = settings.get_current_profile_name() == "long"
    EngineMachine.agreements = agreements_of(toy_model())
    EngineMachine.pools = MORE_POOLS if thorough else POOLS
    missed = run_until_seen(
        EngineMachine,
        COMMON | RARE if thorough else COMMON,
        max_examples=600 if thorough else examples,
        report_multiple_bugs=False,
    )
    seen = EngineMachine.seen
    print(f"{EngineMachine.steps} steps, {dict(sorted(seen.items()))}")
    assert_agreed(EngineMachine.agreements)
    assert EngineMachine.steps >= (20_000 if thorough else 25 * examples)
    assert not missed, f"never happened in {EngineMachine.steps} steps: {missed}"
