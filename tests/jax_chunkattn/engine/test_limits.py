"""What is refused by name before anything changes, and what is done outside the engine's turns."""

from __future__ import annotations

import threading
import time

import pytest

from jax_chunkattn import InvalidRequest, PoolExhausted, RequestLimits, SamplingParams
from jax_chunkattn.engine import scheduler
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_threads import TIMEOUT, start
from tests.jax_chunkattn.toy import toy_model


def ways(engine, prompt, params):
    """All by which parameters come into an engine."""
    held = engine.submit([1, 2, 3], SamplingParams(1))
    held.result()
    return {
        "submit": lambda: engine.submit(prompt, params),
        "submit_samples": lambda: engine.submit_samples(prompt, params),
        "generate": lambda: engine.generate([[1], prompt], [SamplingParams(1), params]),
        "fork": lambda: held.fork(params),
    }


TOO_MUCH = [
    (SamplingParams(4, n=1025), r"1,025 answers \(n\); this engine takes at most 1,024"),
    (SamplingParams(4, n=2**31 - 1), r"2,147,483,647 answers \(n\)"),
    (SamplingParams(4, stop=["x"] * 65), "65 stop strings; this engine takes at most 64"),
    (SamplingParams(4, stop=[f"x{i}" for i in range(200_000)]), "200,000 stop strings"),
    (SamplingParams(4, stop=["x", "y" * 1025]), "1,025 characters in a stop string"),
]


@pytest.mark.parametrize(("params", "message"), TOO_MUCH)
def test_more_than_the_limits_is_refused_whichever_way_it_comes(params, message):
    engine = make_engine(tokenizer=BytePairs())
    for name, ask in ways(engine, [1, 2], params).items():
        before = engine.stats
        began = time.monotonic()
        with pytest.raises(InvalidRequest, match=message) as refused:
            ask()
        assert time.monotonic() - began < 5
        assert "RequestLimits" in str(refused.value)
        assert ("prompt 1 asks" in str(refused.value)) == (name == "generate")
        assert engine.stats == before
        assert not engine.has_work
    engine.run()
    assert_all_returned(engine)


def test_limits_are_the_engines_own():
    limits = RequestLimits(samples=2, stop_strings=1, stop_characters=3)
    engine = make_engine(tokenizer=BytePairs(), limits=limits)
    assert engine.limits == limits
    handles = engine.submit_samples("a", SamplingParams(2, n=2, stop=["abc"], temperature=1.0))
    assert [handle.result().finish_reason for handle in handles] == ["length"] * 2
    for params in (
        SamplingParams(n=3),
        SamplingParams(stop=["a", "b"]),
        SamplingParams(stop=["abcd"]),
    ):
        with pytest.raises(InvalidRequest, match="RequestLimits"):
            engine.submit_samples("a", params)
    large = make_engine(limits=RequestLimits(samples=3000))
    handles = large.submit_samples([1], SamplingParams(1, n=3000, temperature=1.0))
    assert len({handle.params.seed for handle in handles}) == 3000
    large.close()
    for bad in ({"samples": 0}, {"stop_strings": -1}, {"stop_characters": 1.5}, {"samples": True}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be an integer from"):
            RequestLimits(**bad)  # type: ignore[arg-type]


class SlowTokenizer(BytePairs):
    """Counts, and can be made to wait."""

    def __init__(self):
        self.encoded = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def encode(self, text):
        self.encoded += 1
        self.begun.set()
        assert self.go_on.wait(TIMEOUT)
        return super().encode(text)


def test_a_text_is_tokenised_once_however_many_samples_it_has():
    tokenizer = SlowTokenizer()
    engine = make_engine(tokenizer=tokenizer)
    list(engine.generate(["one prompt"], SamplingParams(2, n=8, temperature=1.0)))
    engine.submit_samples("one prompt", SamplingParams(2, n=3, temperature=1.0))
    engine.submit("one prompt")
    engine.pin("a prefix of a chunk")
    assert tokenizer.encoded == 4


@pytest.mark.parametrize(
    "hand_in",
    [
        lambda engine: engine.submit("long", SamplingParams(1)),
        lambda engine: engine.submit_samples("long", SamplingParams(1, n=2)),
        lambda engine: engine.generate(["long"], SamplingParams(1)),
        lambda engine: engine.pin("long" * 10),
    ],
    ids=["submit", "submit_samples", "generate", "pin"],
)
def test_others_go_on_while_a_text_is_tokenised(hand_in):
    tokenizer = SlowTokenizer()
    engine = make_engine(tokenizer=tokenizer)
    tokenizer.go_on.clear()
    kept = []
    join = start(lambda: kept.append(hand_in(engine)))
    assert tokenizer.begun.wait(TIMEOUT)
    others = []
    start(lambda: others.append(run([engine.submit([1, 2, 3], SamplingParams(20))])))()
    assert len(others[0][0]) == 20
    tokenizer.go_on.set()
    join()
    engine.run()


def test_a_prefix_longer_than_the_model_has_positions_cannot_be_pinned():
    model = toy_model()
    engine = make_engine(num_chunks=200)
    longest = [1 + index % 100 for index in range(model.max_positions)]
    with pytest.raises(InvalidRequest, match="has 1025 tokens; the model has 1024 positions"):
        engine.pin([*longest, 1])
    assert engine.stats.pinned == engine.stats.waiting == 0
    pinned = engine.pin(longest)
    engine.run()
    assert pinned.computed
    assert pinned.num_tokens == 1024
    pinned.release()
    assert_all_returned(engine)


def test_generate_names_the_prompt_that_the_pool_cannot_hold():
    engine = make_engine(num_chunks=4)
    with pytest.raises(PoolExhausted, match=r"^prompt 1: a request of 199 tokens"):
        engine.generate([[1, 2, 3], list(range(1, 200))], SamplingParams(4))
    with pytest.raises(PoolExhausted, match=r"^a request of 199 tokens"):
        engine.submit(list(range(1, 200)), SamplingParams(4))
    assert engine.stats.submitted == 0
    assert not engine.has_work
    assert_all_returned(engine)


def test_a_request_that_fits_beside_all_that_is_pinned_hashes_nothing(monkeypatch):
    """And a tight one itself alone: the pinned prefixes have been."""
    hashed = []
    prefix_hashes = scheduler.prefix_hashes

    def counted(tokens, chunk_size):
        hashed.append(tuple(tokens))
        return prefix_hashes(tokens, chunk_size)

    engine = make_engine(num_chunks=10, prefill_tokens=32)
    prefix = tuple(range(1, 49))
    pinned = engine.pin(prefix)
    monkeypatch.setattr(scheduler, "prefix_hashes", counted)
    for _ in range(10):
        engine.submit([7, 8, 9], SamplingParams(2))
    assert hashed == []
    tight, other = (*prefix, *range(60, 130)), tuple(range(1, 119))[::-1]
    engine.submit(tight, SamplingParams(10))
    assert hashed == [tight]
    with pytest.raises(PoolExhausted, match="the pool has 10, 3 pinned for others"):
        engine.submit(other, SamplingParams(10))
    pinned.release()
    engine.submit(other, SamplingParams(10))
    engine.run()
    assert_all_returned(engine)
