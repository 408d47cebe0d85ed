"""Tokens that wait are computed by the calls that cost least on this device."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_chunkattn.planning.options import PlannerOptions
from jax_chunkattn.planning.prefill import CALL_TOKENS, Segment, ends_of_call, next_call
from jax_chunkattn.planning.prefill_round import (
    CPU_COSTS,
    WORTH_SPLITTING,
    call_costs,
    calls_of_round,
    rest_of,
)

LARGEST = CALL_TOKENS[-1]
lengths = st.lists(st.integers(1, 300), min_size=1, max_size=12)
many_short = st.lists(st.integers(1, 20), min_size=1, max_size=40)


def spans_of(lengths, begin=0):
    return [(begin, begin + length) for length in lengths]


def ends_at(spans, calls, align):
    """What calls cost until each span is over; None if they leave anything."""
    left, cost, over = tuple(spans), 0, []
    for size in calls:
        rest = rest_of(left, size, align)
        cost += CPU_COSTS[size]
        over += [cost] * (len(left) - len(rest))
        left = rest
    return None if left else over


def covers(most_cost):
    """All calls, in all orders, that cost no more than this."""
    yield ()
    for size in CALL_TOKENS:
        if CPU_COSTS[size] <= most_cost:
            for others in covers(most_cost - CPU_COSTS[size]):
                yield (size, *others)


ALL_COVERS = list(covers(CPU_COSTS[LARGEST]))


@given(lengths | many_short, st.sampled_from([1, 16, 64]))
def test_no_other_calls_cost_less_and_of_the_cheapest_none_end_spans_sooner(lengths, align):
    spans = spans_of(lengths)
    calls = calls_of_round(spans, align=align)
    found = ends_at(spans, calls, align)
    all_ends = [ends for one in ALL_COVERS if (ends := ends_at(spans, one, align)) is not None]
    if found is None:
        assert calls == [LARGEST]
        assert all_ends == []
        return
    least = min((ends[-1], sum(ends)) for ends in all_ends)
    if len(calls) > 1:
        assert (found[-1], sum(found)) == least
    else:
        assert least[0] == found[-1] or least[0] > WORTH_SPLITTING * found[-1]


@given(st.integers(1, LARGEST))
def test_one_span_has_the_cheapest_calls_that_add_up_to_it(tokens):
    counts = [range(-(-tokens // size) + 1) for size in CALL_TOKENS]
    sums = [
        sum(number * CPU_COSTS[size] for number, size in zip(numbers, CALL_TOKENS, strict=True))
        for numbers in itertools.product(*counts)
        if sum(number * size for number, size in zip(numbers, CALL_TOKENS, strict=True)) >= tokens
    ]
    [one] = [size for size in CALL_TOKENS if size >= tokens][:1]
    saves = min(sums) <= WORTH_SPLITTING * CPU_COSTS[one]
    calls = calls_of_round([(7, 7 + tokens)])
    assert sum(CPU_COSTS[size] for size in calls) == (min(sums) if saves else CPU_COSTS[one])


@given(lengths | many_short, st.sampled_from(CALL_TOKENS), st.sampled_from([1, 16]))
def test_calls_of_a_round_have_no_more_tokens_than_one_may(lengths, most, align):
    calls = calls_of_round(spans_of(lengths), most, align=align)
    assert sum(calls) <= most


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([1], [32]),
        ([33], [128]),
        ([128], [128]),
        ([160], [128, 32]),
        ([288], [128, 128, 32]),
        ([289], [512]),  # 128 + 128 + 32 + 32 would save 8%
        ([384], [512]),
        ([512], [512]),
        ([513], [512]),
        ([9000], [512]),
        ([32] * 9, [128, 128, 32]),
        ([20, 140], [32, 128]),  # the first is over after a call of 32
        ([1] * 10, [128, 32]),  # 8 sequences of at most 16 tokens, and 2
        ([1] * 33, [512]),
    ],
)
def test_the_calls_of_a_cpu(lengths, calls):
    assert calls_of_round(spans_of(lengths)) == calls


def test_parts_end_where_chunks_do_if_they_must():
    """A call of 32 cannot have a part of a chunk of 64 tokens, unless the span ends in it."""
    assert calls_of_round(spans_of([140, 20]), align=64) == [128, 32]
    assert calls_of_round(spans_of([100, 60]), align=64) == [128, 128]
    assert calls_of_round(spans_of([60, 100]), align=64) == [128, 128]
    assert ends_of_call([(64, 164), (0, 60)], 128, 64) == [164]


def test_on_a_gpu_one_call_has_all():
    costs = call_costs(PlannerOptions.for_gpu())
    for tokens in (1, 160, 384, 9000):
        assert calls_of_round([(0, tokens)], costs=costs) == [LARGEST]  # or what `next_call` takes
    for options in (PlannerOptions(), PlannerOptions.for_native()):
        assert call_costs(options) == CPU_COSTS
    assert tuple(CPU_COSTS) == CALL_TOKENS


@given(lengths | many_short, st.sampled_from([1, 16, 64]))
def test_calls_take_what_was_planned(lengths, align):
    """`next_call` needs no larger call than the round has for it, and leaves nothing of it."""
    spans = tuple(spans_of(lengths))
    calls = calls_of_round(spans, align=align)
    for size in calls:
        work = [(None, Segment([1] * (end - begin), [0], begin, end, 0)) for begin, end in spans]
        call, num_tokens = next_call(work, size, align=align)
        assert num_tokens <= size
        assert [segment.end for _, segment in call] == ends_of_call(spans, size, align)
        spans = rest_of(spans, size, align)
    assert calls == [LARGEST] or not spans
