"""Plans for heads that see the last tokens only: they read what is seen, once, and little else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn.planning.planner import PlannerOptions, PlanShape, plan_decode
from pallas_kernels.windows import Window
from tests.jax_chunkattn.planning.plan_helpers import (
    CHUNK,
    POOL,
    SHARE_ALL,
    batches,
    check_reads,
    check_slots,
)

SIZES: Any = {"chunk_size": CHUNK, "num_chunks": POOL}
GPU: Any = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "chunk_size": CHUNK}
OPTIONS = st.sampled_from(
    [
        SHARE_ALL,
        PlannerOptions(item_overhead=0, item_read=0, max_item_chunks=2, max_item_rows=2),
        PlannerOptions(sharing=False),
        PlannerOptions.for_gpu(**GPU, worth_sharing=lambda rows, chunks: rows > 1),
        PlannerOptions.for_gpu(**GPU, num_sms=1000, min_piece_tokens=1, max_private_chunks=0),
        PlannerOptions.for_gpu(**GPU, max_private_chunks=2),
    ]
)
WINDOWS = st.lists(
    st.one_of(st.none(), st.builds(Window, st.integers(1, 40), st.integers(0, 13))),
    min_size=1,
    max_size=3,
)


def part(plan, window: int):
    """The plan of one window."""
    return jax.tree.map(lambda array: array[window], plan)


@settings(max_examples=60, deadline=None)
@given(batches(), OPTIONS, WINDOWS, st.data())
def test_every_query_that_a_plan_is_good_for_reads_what_it_sees_once(batch, options, windows, data):
    tables, lengths = batch
    plan, summary = plan_decode(tables, lengths, **SIZES, options=options, windows=windows)
    later = [
        data.draw(st.integers(length, len(table) * CHUNK))
        for table, length in zip(tables, lengths, strict=True)
    ]
    assert len(summary.by_window) == len(windows)
    for index, window in enumerate(windows):
        of_window = part(plan, index)
        check_reads(of_window, tables, lengths, window)
        check_reads(of_window, tables, later, window)
        if of_window.partials is not None:
            rows = len(of_window.private_chunks)
            check_slots(of_window.items, of_window.partials, rows, 2, options.gpu.align)


@settings(max_examples=50, deadline=None)
@given(batches(), OPTIONS, st.integers(1, 40))
def test_tokens_to_come_have_a_private_place(batch, options, size):
    tables, lengths = batch
    plan, _ = plan_decode(tables, lengths, **SIZES, options=options, windows=[Window(size)])
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        for position in range(length, len(table) * CHUNK):
            index = (position - plan.covered_tokens[0, row]) // CHUNK
            assert plan.private_chunks[0, row, index] == table[position // CHUNK]


@settings(max_examples=50, deadline=None)
@given(batches(), OPTIONS)
def test_a_window_that_hides_nothing_is_planned_as_none(batch, options):
    tables, lengths = batch
    if options.gpu is not None:
        return  # packed by rules that need whole runs
    whole, expected = plan_decode(tables, lengths, **SIZES, options=options)
    plan, summary = plan_decode(tables, lengths, **SIZES, options=options, windows=[Window(500)])
    jax.tree.map(np.testing.assert_array_equal, replace(part(plan, 0), hidden=None), whole)
    assert summary.chunk_reads == expected.chunk_reads


def test_rows_share_what_all_of_their_windows_have():
    prefix = list(range(20))
    tables = [[*prefix, 30, 31], [*prefix, 40], [*prefix, 50, 51, 52]]
    lengths = [85, 82, 90]
    plan, summary = plan_decode(
        tables,
        lengths,
        chunk_size=CHUNK,
        num_chunks=POOL,
        options=SHARE_ALL,
        windows=[Window(40, sinks=4)],
    )
    [found] = summary.by_window
    # Up to the last token that its chunks have room for, the third row's window begins at 52.
    items = part(plan, 0).items
    shared = [
        items.chunks[begin : begin + count].tolist()
        for begin, count in zip(items.chunk_begin, items.chunk_count, strict=True)
    ][: int(items.count)]
    assert shared == [[0], [13, 14, 15, 16, 17, 18, 19]]
    assert found.shared_items == 2
    # Each row reads the chunks before that by itself: from positions 45, 42 and 50 on.
    assert plan.private_chunks[0, 0, :5].tolist() == [11, 12, 30, 31, POOL]
    assert plan.private_chunks[0, 1, :5].tolist() == [10, 11, 12, 40, POOL]
    assert plan.private_chunks[0, 2, :5].tolist() == [12, 50, 51, 52, POOL]


def test_what_is_read_does_not_grow_with_the_context():
    def reads(tokens):
        chunks = -(-tokens // CHUNK)
        _, summary = plan_decode(
            [range(chunks)] * 4,
            [tokens] * 4,
            chunk_size=CHUNK,
            num_chunks=1000,
            windows=[None, Window(40, 8)],
        )
        return [one.chunk_reads for one in summary.by_window]

    (full, windowed), (more, as_many) = reads(400), reads(2000)
    assert more == 5 * full
    assert windowed == as_many <= 4 * (40 // CHUNK + 1 + 2)


def test_plans_of_several_windows_have_one_shape_and_keep_that_of_the_last():
    at_least = PlanShape(rows=4, items=64, item_chunks=512, private_chunks=32)
    plan, _ = plan_decode(
        [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]],
        [18, 19],
        chunk_size=CHUNK,
        num_chunks=POOL,
        at_least=at_least,
        windows=[None, Window(5)],
    )
    assert PlanShape.of(plan) == at_least
    assert plan.items.count.shape == (2,)


@pytest.mark.parametrize("sizes", [(0,), (-3, 0), (5, -1)])
def test_windows_without_a_token_are_refused(sizes):
    with pytest.raises(ValueError, match=f"not {min(sizes)}"):
        Window(*sizes)


def test_short_runs_of_one_row_are_no_items_on_a_gpu():
    """The sinks, and what is left of a window behind what rows share."""
    options = PlannerOptions.for_gpu(**GPU, sharing=False, max_private_chunks=2)
    tables, lengths = [list(range(30)), list(range(30, 60))], [118, 110]
    plan, _ = plan_decode(
        tables,
        lengths,
        **SIZES,
        options=options,
        windows=[Window(40, sinks=4), Window(12, sinks=8)],
    )
    items = plan.items
    counts = [items.chunk_count[window, : items.count[window]].tolist() for window in range(2)]
    assert counts[1] == []
    assert len(counts[0]) >= 2
    assert min(counts[0]) > 2
    for window, sees in enumerate((Window(40, sinks=4), Window(12, sinks=8))):
        check_reads(part(plan, window), tables, lengths, sees)
