from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import (
    CALL_TOKENS,
    Segment,
    max_segments,
    next_call,
    pack_segments,
)
from tests.jax_chunkattn.planning.plan_helpers import check_slots


def segments_of(lengths):
    return [
        (owner, Segment(list(range(length)), [owner], begin=5, end=5 + length, write_from=5))
        for owner, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60))
def test_calls_take_every_token_once_in_order_and_never_more_than_fits(lengths):
    work = segments_of(lengths)
    taken = [[] for _ in lengths]
    order = []
    while work:
        call, num_tokens = next_call(work)
        assert 1 <= len(call) <= max_segments(num_tokens)
        used = 0
        for owner, segment in call:
            assert segment.begin == 5 + len(taken[owner])
            assert segment.end - segment.begin == len(segment.tokens) > 0
            taken[owner] += segment.tokens
            order.append(owner)
            used += len(segment.tokens)
        assert used <= num_tokens
        work = rest_of(work, call)
    assert taken == [list(range(length)) for length in lengths]
    assert order == sorted(order)


def rest_of(work, call):
    """What a call has left of the work."""
    done = {owner: segment.end for owner, segment in call}
    rest = []
    for owner, segment in work:
        begin = done.get(owner, segment.begin)
        if begin < segment.end:
            tokens = segment.tokens[begin - segment.begin :]
            rest.append((owner, dataclasses.replace(segment, tokens=tokens, begin=begin)))
    return rest


def test_a_call_is_as_small_as_what_is_left_allows():
    for left, expected in ((1, 32), (32, 32), (33, 128), (128, 128), (129, 512), (9000, 512)):
        assert next_call(segments_of([left]))[1] == expected
    for left, expected in ((1, 32), (33, 128), (129, 128), (9000, 128)):
        assert next_call(segments_of([left]), 128)[1] == expected
    assert CALL_TOKENS == (32, 128, 512)


def test_many_short_segments_take_a_call_with_room_for_them():
    call, num_tokens = next_call(segments_of([1] * 8))
    assert (len(call), num_tokens) == (8, 128)
    call, num_tokens = next_call(segments_of([1] * 40))
    assert (len(call), num_tokens) == (32, 512)
    call, num_tokens = next_call(segments_of([1] * 40), 32)
    assert (len(call), num_tokens) == (2, 32)


def test_nothing_comes_behind_a_segment_that_is_cut():
    """It may read what the rest of that segment computes, which is in no earlier call."""
    work = [
        (owner, Segment([7] * length, [owner], begin=0, end=length, write_from=0))
        for owner, length in enumerate((10, 600, 20))
    ]
    call, num_tokens = next_call(work, align=64)
    assert [(owner, segment.end) for owner, segment in call] == [(0, 10), (1, 448)]
    assert num_tokens == 512


def packed_on_gpu(segments, num_tokens, **work):
    options = PlannerOptions.for_gpu(chunk_size=16, **work)
    fit = {"num_tokens": num_tokens, "chunk_size": 16, "num_chunks": 1000}
    return pack_segments(segments, **fit).plan, pack_segments(segments, **fit, options=options).plan


def chunks_seen(plan, num_tokens):
    """How often the items let each token see each chunk: [T, N]."""
    seen = np.zeros((num_tokens, 1000), int)
    items = plan.items
    for item in range(int(items.count)):
        row, begin = items.row_begin[item], items.chunk_begin[item]
        rows = slice(row, row + items.row_count[item])
        np.add.at(seen[rows].T, items.chunks[begin : begin + items.chunk_count[item]], 1)
    return seen


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (16, 1)])
def test_items_before_the_segments_are_cut_for_a_gpu(heads):
    """Three segments behind 40 chunks, two of them behind 20 more: rows are tokens."""
    common, more = list(range(40)), list(range(40, 60))
    segments = [
        Segment([1] * 30, [*common, *more, 60, 61], 960, 990, 960),
        Segment([2] * 50, [*common, *more, 70, 71, 72, 73], 965, 1015, 965),
        Segment([3] * 7, [*common, 80], 640, 647, 640),
    ]
    work = {"num_heads": heads[0], "num_kv_heads": heads[1]}
    whole, cut = packed_on_gpu(segments, 128, **work)
    group = heads[0] // heads[1]
    assert whole.partials is None
    np.testing.assert_array_equal(chunks_seen(cut, 128), chunks_seen(whole, 128))
    check_slots(cut.items, cut.partials, 128, group, 64)
    assert cut.items.row_count.max() <= 64 // group
    assert cut.items.chunk_count.max() < 40  # a few programs would leave the device idle
    assert cut.items.chunks[:60].tolist() == whole.items.chunks[:60].tolist()


def test_calls_of_one_size_need_one_program():
    """However many segments there are, and however much is in the pool before each."""
    run = jax.jit(chex.assert_max_traces(lambda batch: batch, n=len(CALL_TOKENS)))
    random = np.random.default_rng(0)
    sizes = set()
    for most in [1, 5, 40, 512] * 10:
        work = []
        for owner in range(random.integers(1, 9)):
            begin, end = sorted(random.choice(513, 2, replace=False).tolist())
            end = min(end, begin + most)
            table = random.permutation(100)[:32].tolist()
            work.append((owner, Segment([1] * (end - begin), table, begin, end, begin)))
        call, num_tokens = next_call(work)
        segments = [segment for _, segment in call]
        batch = pack_segments(segments, num_tokens=num_tokens, chunk_size=16, num_chunks=100)
        run.eval_shape(batch)
        sizes.add(num_tokens)
    assert sizes == set(CALL_TOKENS)


def test_calls_of_one_size_have_one_shape_on_a_gpu():
    """From nothing before the segment to eight segments with a prefix of their own."""
    alone = [Segment([1] * 100, list(range(7)), 0, 100, 0)]
    several = [
        Segment([1] * 16, list(range(20 * row, 20 * row + 20)), 304, 320, 304) for row in range(8)
    ]
    work = {"num_heads": 32, "num_kv_heads": 8}
    first, second = (packed_on_gpu(segments, 128, **work)[1] for segments in (alone, several))
    for plan in (first, second):
        assert plan.partials is not None
        assert plan.partials.slots.shape == (512,)
        assert plan.partials.row_begin.shape == (129,)
        assert plan.items.row_begin.shape == plan.partials.item_slot.shape == (64,)
