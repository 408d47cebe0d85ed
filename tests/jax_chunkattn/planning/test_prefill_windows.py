"""Prefill calls for heads that see the last tokens only, and the first few."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import Segment, pack_segments
from pallas_kernels.windows import EVERYTHING, Window
from tests.jax_chunkattn.planning.plan_helpers import SHARE_ALL

CHUNK, POOL, TOKENS = 4, 200, 32
WINDOWS = st.lists(
    st.one_of(st.none(), st.builds(Window, st.integers(1, 40), st.integers(0, 13))),
    min_size=1,
    max_size=3,
)


RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.one_of(st.just(1), st.integers(1, 16))),
    min_size=1,
    max_size=2,
)
"""Where segments begin, and their tokens; one of a token may end a prompt that is cached."""


def segments(shared: int, ranges: list[tuple[int, int]]) -> list[Segment]:
    """Of prompts that have so many chunks in common, as far as they begin behind them."""
    packed, fresh = [], iter(range(12, POOL))
    for begin, number in ranges:
        before = list(range(min(shared, begin // CHUNK)))
        needed = -(-(begin + number) // CHUNK) - len(before)
        table = [*before, *(next(fresh) for _ in range(needed))]
        packed.append(Segment([7] * number, table, begin, begin + number, begin))
    return packed


def tokens_read(plan, packed) -> list[Counter]:
    """How often each packed token reads each slot (chunk, place), by the plan of one window."""
    items, hidden = plan.items, plan.hidden
    read: list[Counter] = [Counter() for _ in range(sum(len(one.tokens) for one in packed))]
    for item in range(int(items.count)):
        begin = items.chunk_begin[item]
        chunks = items.chunks[begin : begin + items.chunk_count[item]]
        slots = [(int(chunk), place) for chunk in chunks for place in range(CHUNK)]
        for row in range(items.row_begin[item], items.row_begin[item] + items.row_count[item]):
            read[row].update(slots)
    row = 0
    for number, segment in enumerate(packed):
        own = int(plan.own_chunk[number])
        for position in range(segment.begin, segment.end):
            opens = position + 1 - hidden.size - hidden.offset[number]
            for at in range(own * CHUNK, position + 1):
                place = at - own * CHUNK
                if place < hidden.begin[number] or place >= opens:
                    read[row][int(plan.block_tables[number, at // CHUNK]), at % CHUNK] += 1
            row += 1
    return read


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 12),
    RANGES,
    WINDOWS,
    st.sampled_from([SHARE_ALL, PlannerOptions(sharing=False)]),
)
def test_every_token_reads_what_it_sees_once(shared, ranges, windows, options):
    packed = segments(shared, ranges)
    sizes: Any = {"num_tokens": TOKENS, "chunk_size": CHUNK, "num_chunks": POOL}
    plan = pack_segments(packed, **sizes, options=options, windows=windows).plan
    for number, window in enumerate(windows):
        of_window = jax.tree.map(np.asarray, plan.of_windows(number))
        seen = window or EVERYTHING
        expected = [
            Counter(
                (segment.chunk_ids[key // CHUNK], key % CHUNK)
                for key in range(position + 1)
                if key < seen.sinks or key > position - seen.size
            )
            for segment in packed
            for position in range(segment.begin, segment.end)
        ]
        assert tokens_read(of_window, packed) == expected


@pytest.mark.parametrize("sinks", [1, 3, 4, 5])
def test_a_window_that_begins_where_a_chunk_does_hides_what_is_between_it_and_the_sinks(sinks):
    """The chunk that it begins with is read as a whole, and is in no table."""
    size, position = 8, 31
    segment = Segment([7], list(range(8)), position, position + 1, position + 1)
    sizes: Any = {"num_tokens": TOKENS, "chunk_size": CHUNK, "num_chunks": POOL}
    plan = pack_segments([segment], **sizes, windows=[Window(size, sinks)]).plan
    [read] = tokens_read(jax.tree.map(np.asarray, plan.of_windows(0)), [segment])
    seen = [*range(sinks), *range(position + 1 - size, position + 1)]
    assert read == Counter((key // CHUNK, key % CHUNK) for key in seen)
