"""Groups of samples: as they come, and no longer than until enough of them are there."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_chunkattn import InvalidRequest, RequestFailed, SamplingParams
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine

PROMPTS = [[1, 2, 3] * 7, [4, 5], [1, 2, 3] * 7 + [6]]
LENGTHS = (24, 3, 12)


def params(length, n=2, **how):
    return SamplingParams(length, n=n, seed=length, temperature=1.0, **how)


def test_groups_come_in_their_order_or_as_they_are_there():
    engine = make_engine()
    every = [params(length) for length in LENGTHS]
    in_order = list(engine.generate(PROMPTS, every))
    as_they_come = list(engine.generate(PROMPTS, every, in_order=False))
    assert [group.index for group in in_order] == [0, 1, 2]
    assert [group.index for group in as_they_come] == [1, 2, 0]
    assert sorted(as_they_come, key=lambda group: group.index) == in_order
    assert_all_returned(engine)


def test_a_group_is_there_while_longer_ones_run():
    engine = make_engine()
    outputs = engine.generate(PROMPTS, [params(length) for length in LENGTHS], in_order=False)
    assert next(outputs).index == 1
    assert engine.stats.running > 0
    outputs.close()
    assert_all_returned(engine)


STOPS = tuple(range(0, 256, 16))
"""One token in sixteen: samples come to be of many lengths."""


def test_when_enough_samples_have_ended_the_others_are_aborted():
    engine = make_engine()
    every = [params(40, n=6, stop_token_ids=STOPS) for _ in PROMPTS]
    whole = list(engine.generate(PROMPTS, every))
    decoded = engine.stats.decode_tokens
    groups = list(engine.generate(PROMPTS, every, enough=2))
    assert engine.stats.decode_tokens - decoded < decoded
    aborted = 0
    for group, same in zip(groups, whole, strict=True):
        reasons = [sample.finish_reason for sample in group.samples]
        assert len(reasons) == 6
        assert len(reasons) - reasons.count("abort") >= 2
        aborted += reasons.count("abort")
        for sample, full in zip(group.samples, same.samples, strict=True):
            if sample.finish_reason == "abort":
                assert sample.tokens == full.tokens[: len(sample.tokens)]
            else:
                assert sample == full
    assert aborted
    assert_all_returned(engine)


def test_a_group_that_is_not_read_yet_is_ended_too():
    """The first is long; the samples of the second are not decoded until it is their turn."""
    engine = make_engine()
    every = [params(60, n=1), params(60, n=3, stop_token_ids=STOPS)]
    _, second = engine.generate(PROMPTS[:2], every, enough=1)
    _, alone = engine.generate(PROMPTS[:2], every)
    shortest = min(len(sample.tokens) for sample in alone.samples)
    assert shortest < 40
    assert all(len(sample.tokens) < shortest + 12 for sample in second.samples)


def test_all_samples_may_be_asked_for():
    engine = make_engine()
    [group] = engine.generate(PROMPTS[:1], params(5), enough=2)
    assert [sample.finish_reason for sample in group.samples] == ["length", "length"]


@pytest.mark.parametrize(("enough", "prompt"), [(0, 0), (3, 1)])
def test_no_more_can_be_enough_than_there_are(enough, prompt):
    engine = make_engine()
    every = [params(4, n=3), params(4), params(4)]
    message = f"prompt {prompt}: enough must be from 1 to its {3 - prompt} samples, got {enough}"
    with pytest.raises(InvalidRequest, match=message):
        engine.generate(PROMPTS, every, enough=enough)
    assert engine.stats.waiting == 0


def test_an_error_is_raised_where_its_group_would_be():
    engine = make_engine()
    outputs = engine.generate(PROMPTS, [params(length) for length in LENGTHS], in_order=False)
    engine.close()
    with pytest.raises(RequestFailed, match="the engine was closed"):
        next(outputs)


def test_threads_may_read_one_iteration():
    engine = make_engine()
    outputs = engine.generate([[1, 2, index] for index in range(24)], SamplingParams(5))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [output.index for output in outputs], range(4)))
    assert sorted(itertools.chain(*found)) == list(range(24))
    assert_all_returned(engine)


def test_a_callback_may_read_what_it_interrupts():
    found = []

    def read(event):
        found.extend(output.index for output in outputs)

    engine = make_engine()
    engine.submit([7], SamplingParams(2), on_event=read)
    outputs = engine.generate(PROMPTS, SamplingParams(3))
    found.extend(output.index for output in outputs)
    assert sorted(found) == [0, 1, 2]
    assert_all_returned(engine)
