"""Ways in which the same tokens can come to be decoded.

Each gives the greedy tokens that follow `PROMPT`, and their log-probabilities, after whatever
happened before or beside it, and asserts that it did happen. Chunks hold 16 tokens, and `PROMPT`
fills four of them and a half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory

from hypothesis import settings

from jax_chunkattn import Completion, Engine, SamplingParams
from tests.jax_chunkattn.rule.features import Feature
from tests.jax_chunkattn.toy import token_tree

NUM_TOKENS = 40  # of the answer: it goes on over two chunks' ends
[PROMPT, *OTHERS] = token_tree((1, 37), (2, 17), (2, 18), seed=5)  # they begin alike
[STRANGER] = token_tree((1, 90), seed=6)

PARAMS = SamplingParams(NUM_TOKENS, logprobs=0)

Answer = tuple[tuple[int, float], ...]
"""Tokens, and the natural logarithms of their probabilities."""

Answers = Iterator[tuple[str, Answer]]
"""What happened, in words, and the answer."""


def _answer_of(completion: Completion) -> Answer:
    logprobs = [logprobs.chosen for logprobs in completion.logprobs]
    return tuple(zip(completion.tokens, logprobs, strict=True))


def _answer(engine: Engine) -> Answer:
    return _answer_of(engine.submit(PROMPT, PARAMS).result())


def cold(feature: Feature) -> Answers:
    """Nothing is cached, and nobody else is there."""
    yield "alone", _answer(feature.engine())


def warm_at_every_split(feature: Feature) -> Answers:
    """Its first tokens were computed for another request, in whole chunks and in part of one. With
    no feature at every split; with one at a chunk's ends, beside them and between."""
    engine = feature.engine()
    few = (feature.options or feature.learned) and settings.get_current_profile_name() != "long"
    for split in range(1, len(PROMPT)):
        if few and split % 16 not in (0, 1, 7, 15):
            continue
        engine.reset()
        another = [*PROMPT[:split], *[PROMPT[split] ^ 1] * 16]
        engine.submit(another, SamplingParams(1)).result()
        before = engine.stats.prompts
        answer = _answer(engine)
        after = engine.stats.prompts
        found = after.hit + after.copied - before.hit - before.copied
        assert found == (split if feature.exact else split - split % 16)
        yield f"behind {split} tokens", answer


def after_its_own_answer(feature: Feature) -> Answers:
    """The answer is cached too, and decoding moves onto its chunks."""
    engine = feature.engine()
    first = _answer(engine)
    yield "again", _answer(engine)
    history = [*PROMPT, *(token for token, _ in first)]
    for split in (len(PROMPT) + 1, len(PROMPT) + 17, len(history) - 1):
        rest = SamplingParams(len(history) - split, logprobs=0)
        answer = _answer_of(engine.submit(history[:split], rest).result())
        yield f"as a prompt of {split} tokens", (*first[: split - len(PROMPT)], *answer)


def under_other_prefixes(feature: Feature) -> Answers:
    """What begins like it, and what does not, was computed before, in either order."""
    for others in (OTHERS, [*OTHERS, STRANGER], [STRANGER, *reversed(OTHERS)]):
        engine = feature.engine()
        for other in others:
            engine.submit(other, SamplingParams(5)).result()
        yield f"after {len(others)} others", _answer(engine)


def in_pieces(feature: Feature) -> Answers:
    """Prefill is cut into calls of other sizes, and at other places by what it shares them with."""
    for prefill_tokens in (32, 128):
        for ahead in ([], [STRANGER[:23]], [STRANGER[:7], STRANGER]):
            engine = feature.engine(prefill_tokens=prefill_tokens)
            for other in ahead:
                engine.submit(other, SamplingParams(2))
            yield f"{prefill_tokens} tokens a call behind {len(ahead)}", _answer(engine)


def among_mates(feature: Feature) -> Answers:
    """Others decode in the same calls: few, many, alike or not, come before it or after."""
    for before, after in (
        ([], OTHERS[:1]),
        (OTHERS[:1], []),
        (OTHERS, [STRANGER]),
        ([STRANGER, STRANGER[:50]], OTHERS),
        ([STRANGER[: 30 + index] for index in range(9)], OTHERS),
    ):
        engine = feature.engine()
        for other in before:
            engine.submit(other, SamplingParams(30))
        handle = engine.submit(PROMPT, PARAMS)
        for other in after:
            engine.submit(other, SamplingParams(50))
        yield f"among {len(before)} and {len(after)}", _answer_of(handle.result())


def joined_at_any_step(feature: Feature) -> Answers:
    """Others come while it decodes, so that it changes its row and its place in the loop."""
    for turns in (1, 2, 5):
        engine = feature.engine()
        handle = engine.submit(PROMPT, PARAMS)
        for other in (*OTHERS, STRANGER):
            for _ in range(turns):
                engine.step()
            engine.submit(other, SamplingParams(9))
        yield f"every {turns} turns", _answer_of(handle.result())


def forked(feature: Feature) -> Answers:
    """It goes on from another request's tail: before the first token, in a chunk, at its end."""
    for held in range(0, 33, 4):
        engine = feature.engine()
        parent = engine.submit(PROMPT, PARAMS, hold=True)
        while len(parent.tokens) < held:
            engine.step()
        child = parent.fork(PARAMS)
        yield f"forked after {held} tokens", _answer_of(child.result())
        yield f"its parent after {held} tokens", _answer_of(parent.result())
        assert engine.stats.forks == (1 if held else 0)
    samples = feature.engine().submit_samples(PROMPT, replace(PARAMS, n=3))
    for number, sample in enumerate(samples):
        yield f"sample {number}", _answer_of(sample.result())


def _crowded(feature: Feature) -> Engine:
    """An engine that has room for ten chunks: prefixes are pinned in the rest of the pool, so that
    its programs are those of other histories."""
    if "window_chunks" in feature.options:  # of which pins would keep some
        return feature.engine(num_chunks=10, max_running=3)
    engine = feature.engine()
    engine.run()  # what is learned is in the pool then
    spare = engine.stats.chunks_free - 10
    for begin in range(0, spare, 5):
        [prefix] = token_tree((1, 16 * min(5, spare - begin)), seed=100 + begin)
        engine.pin(prefix)
    engine.run()
    assert engine.stats.chunks_free == 10
    return engine


def preempted(feature: Feature) -> Answers:
    """The pool runs short: it gives way to older ones, and is computed again from its tokens."""
    engine = _crowded(feature)
    older = engine.submit(STRANGER[:40], SamplingParams(100))
    engine.step()
    handle = engine.submit(PROMPT, PARAMS)
    yield "behind an older one", _answer_of(handle.result())
    assert engine.stats.preemptions
    older.result()


def evicted(feature: Feature) -> Answers:
    """What it left in the cache is given up for others, and computed again."""
    engine = _crowded(feature)
    _answer(engine)
    engine.submit(STRANGER, SamplingParams(60)).result()
    assert engine.stats.evictions
    yield "after others took its chunks", _answer(engine)


def brought_back(feature: Feature) -> Answers:
    """What it left was evicted, and comes back from memory; and from the disk, to an engine that
    begins with it."""
    sizes = {"num_chunks": 10, "max_running": 3, "load": "always"}
    with TemporaryDirectory() as folder:
        for tier in ({"host_memory": "1MB"}, {"disk": folder, "disk_memory": "1GB"}):
            engine = feature.engine(**sizes, **tier)
            _answer(engine)
            engine.submit(STRANGER, SamplingParams(60)).result()
            yield f"back from {next(iter(tier))}", _answer(engine)
            use = engine.stats.prompts
            assert use.host + use.disk >= 48
            engine.close()
        engine = feature.engine(**sizes, **tier)
        yield "in another engine", _answer(engine)
        assert engine.stats.prompts.disk == 64
        engine.close()


HISTORIES: tuple[Callable[[Feature], Answers], ...] = (
    cold,
    warm_at_every_split,
    after_its_own_answer,
    under_other_prefixes,
    in_pieces,
    among_mates,
    joined_at_any_step,
    forked,
    preempted,
    evicted,
    brought_back,
)
