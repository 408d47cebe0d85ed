from __future__ import annotations

from array import array
from typing import Any

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn.planning.planner import PlannerOptions, PlanShape, bucket, plan_decode
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels.specs import AttentionCase
from tests.effort import examples
from tests.jax_chunkattn.planning.plan_helpers import (
    CHUNK,
    POOL,
    SHARE_ALL,
    batches,
    check_coverage,
    items_of,
)

options = st.builds(
    PlannerOptions,
    sharing=st.booleans(),
    item_overhead=st.sampled_from([0.0, 1.0 * CHUNK, 3.0 * CHUNK]),
    item_read=st.sampled_from([0.0, 1.0, 2.5]),
    max_item_chunks=st.sampled_from([None, 1, 3]),
    max_item_rows=st.sampled_from([None, 1, 2]),
)


@settings(max_examples=examples(25, 60), deadline=None)
@given(batches(), options)
def test_every_row_attends_to_its_tokens_once_however_work_is_cut(batch, options):
    tables, lengths = batch
    plan, summary = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=POOL, options=options)
    check_coverage(plan, tables, lengths)
    assert plan.partials is None
    for _, rows, chunks in items_of(plan):
        assert rows <= (options.max_item_rows or rows)
        assert len(chunks) <= (options.max_item_chunks or len(chunks))
    if options.max_item_rows is None:  # a cut by rows reads its chunks once per part
        many = any(rows > 1 for _, rows, _ in items_of(plan))
        assert summary.shared == many
    assert summary.chunk_reads <= summary.unshared_chunk_reads


@settings(max_examples=200, deadline=None)
@given(batches())
def test_sharing_everything_reads_every_full_chunk_once(batch):
    tables, lengths = batch
    _, summary = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=POOL, options=SHARE_ALL)
    full = {c for table, n in zip(tables, lengths, strict=True) for c in table[: n // CHUNK]}
    assert summary.chunk_reads == len(full)
    assert summary.unshared_chunk_reads == sum(n // CHUNK for n in lengths)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_tokens_to_come_have_a_private_place(batch):
    """The chunk the decode loop writes position `length` to is the row's own."""
    tables, lengths = batch
    plan, _ = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=POOL, options=SHARE_ALL)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        for position in range(length, len(table) * CHUNK):
            index = (position - plan.covered_tokens[row]) // CHUNK
            assert plan.private_chunks[row, index] == table[position // CHUNK]


def test_items_are_the_largest_blocks_of_rows_and_chunks():
    tables = [[0, 1, 2, 3, 9], [0, 1, 2, 4], [0, 1, 5], [6, 7]]
    lengths = [17, 16, 12, 8]
    plan, summary = plan_decode(
        tables, lengths, chunk_size=CHUNK, num_chunks=POOL, options=SHARE_ALL
    )
    assert items_of(plan) == [(0, 3, (0, 1)), (0, 2, (2,))]
    assert summary.common_tokens == 12
    assert summary.reason == "5 of 13 chunk reads saved"


def test_a_run_is_shared_when_that_is_cheaper_than_every_row_reading_it():
    def decision(rows, chunks, **options):
        tables = [[*range(chunks), 50 + row] for row in range(rows)]
        _, summary = plan_decode(
            tables,
            [chunks * CHUNK + 1] * rows,
            chunk_size=CHUNK,
            num_chunks=POOL,
            options=PlannerOptions(**options),
        )
        return summary.shared, summary.reason

    costs = {"item_overhead": 3.0 * CHUNK, "item_read": 2.5}
    too_short = "the common prefixes are too short to pay for a work item"
    assert decision(4, 2, **costs) == (False, too_short)
    assert decision(4, 3, **costs)[0]
    assert not decision(2, 40, **costs)[0]
    assert decision(2, 4, item_overhead=3.0 * CHUNK, item_read=1.0)[0]
    assert decision(4, 3, sharing=False) == (False, "sharing is switched off")
    assert decision(1, 9) == (False, "no two rows have a full chunk in common")


@pytest.mark.parametrize("chunk_size", [8, 16, 64, 128])
def test_what_pays_depends_on_tokens_however_they_are_cut_into_chunks(chunk_size):
    def shares(rows, tokens):
        chunks = tokens // chunk_size
        tables = [[*range(chunks), 150 + row] for row in range(rows)]
        lengths = [tokens + 1] * rows
        _, summary = plan_decode(tables, lengths, chunk_size=chunk_size, num_chunks=200)
        return summary.shared

    assert shares(5, 128)
    assert not shares(4, 128)
    assert not shares(2, 1024)


def test_a_long_private_run_becomes_an_item_of_its_row():
    tables = [[*range(100)], [100, 101], [102, 103], [104, 105]]
    plan, summary = plan_decode(tables, [399, 5, 6, 7], chunk_size=CHUNK, num_chunks=POOL)
    assert summary.private_items == 1
    [(row, rows, chunks)] = items_of(plan)
    assert (row, rows) == (0, 1)
    assert len(chunks) >= 90


def test_a_run_above_a_run_that_does_not_pay_is_still_shared():
    tables = [[0, 1, 2, 3, 4, 5, 10, 11, 20 + row] for row in range(2)]
    tables += [[0, 1, 2, 3, 4, 5, 12, 30 + row] for row in range(6)]
    lengths = [8 * CHUNK + 1] * 2 + [7 * CHUNK + 1] * 6
    options = PlannerOptions(item_overhead=3.0 * CHUNK)
    plan, _ = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=POOL, options=options)
    assert items_of(plan) == [(0, 8, (0, 1, 2, 3, 4, 5)), (2, 6, (12,))]
    assert plan.private_chunks[0, :3].tolist() == [10, 11, 20]


def test_rows_that_their_chunks_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="row 1 has 33 tokens, its 2 chunks hold 32"):
        plan_decode([[0, 1], [0, 2]], [32, 33], chunk_size=16, num_chunks=9)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        plan_decode([[0, 1]], [20], chunk_size=0, num_chunks=9)


def test_shapes_are_powers_of_two_and_never_below_the_shape_asked_for():
    inputs = case_inputs(AttentionCase("1,5_64,16", 2, 2, 16, chunk_size=16))
    assert PlanShape.of(inputs.plan) == PlanShape(8, 16, 256, 16)
    shape = PlanShape(32, 64, 512, 128)
    plan, _ = plan_decode([[1, 2]], [20], chunk_size=16, num_chunks=9, at_least=shape)
    assert PlanShape.of(plan) == shape


def test_plans_of_all_sizes_need_a_program_for_each_doubling():
    """Of rows, up to 64; of private chunks, up to 128; of shared chunks, up to 512."""
    run = jax.jit(chex.assert_max_traces(lambda plan: plan, n=7 + 3 + 1))
    by_rows = [[[0, 1 + row] for row in range(rows)] for rows in range(1, 65)]
    private = [[range(each, each + 4 * size, 4) for each in range(4)] for size in range(1, 100)]
    shared = [[[*range(size), 390 + row] for row in range(4)] for size in range(1, 390)]
    for tables in (*by_rows, *private, *shared):
        lengths = [CHUNK * len(table) for table in tables]
        plan, _ = plan_decode(
            list(map(list, tables)), lengths, chunk_size=CHUNK, num_chunks=POOL, options=SHARE_ALL
        )
        run.eval_shape(plan)


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)]
)
def test_bucket(size, expected):
    assert bucket(size) == expected
    assert bucket(size, 8) == max(8, expected)


KINDS: list[Any] = [
    list,
    np.array,
    lambda row: array("i", row),
    lambda row: np.array(row, np.int32),
    lambda row: np.array(row, np.uint32),
]


@pytest.mark.parametrize(
    ("tables", "lengths", "message"),
    [
        ([[0, 9]], [30], r"row 0 has chunk id 9 at position 1; the pool's ids go from 0 to 8"),
        ([[0, 1], [-1, 2]], [20, 30], "row 1 has chunk id -1 at position 0"),
        ([[0], [], [1, 2, -7]], [16, 0, 30], "row 2 has chunk id -7 at position 2"),
        ([[0, 1, 99]], [20], "chunk id 99 at position 2"),  # reserved, not read yet
        ([[0, 2**40]], [30], "integers that fit in int32"),
        ([[0, 1.0]], [30], "chunk ids must be integers"),
        ([np.array([0, 1], np.float32)], [30], "chunk ids must be integers"),
        ([[0, 1]], [-5], "row 0 has -5 tokens"),
        ([[0, 1]], [20.7], "lengths must be integers, got float64"),
        ([[0, 1]], [True], "lengths must be integers, got bool"),
        ([[0, 1]], [2**40], "row 0 has 1,099,511,627,776 tokens, its 2 chunks hold 32"),
        ([[0, 1]], [20, 20], "1 tables need as many lengths"),
        ([], [20], "0 tables need as many lengths"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_chunks_that_are_not_in_the_pool_and_lengths_that_are_none_are_refused(
    tables, lengths, message
):
    with pytest.raises(ValueError, match=message):
        plan_decode(tables, lengths, chunk_size=16, num_chunks=9)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_outside_the_pool_are_refused_whatever_the_rows_are(kind):
    for bad in (9, 2**31 - 1):
        with pytest.raises(ValueError, match=f"row 1 has chunk id {bad} at position 0"):
            plan_decode([kind([0]), kind([bad, 1])], [9, 20], chunk_size=16, num_chunks=9)


def test_tables_may_be_lists_numpys_integers_or_buffers():
    tables, lengths = [[0, 1, 2], [0, 1, 8]], [40, 48]
    plans = [
        plan_decode(list(map(kind, tables)), lengths, chunk_size=16, num_chunks=9)[0]
        for kind in KINDS
    ]
    for plan in plans[1:]:
        chex.assert_trees_all_equal(plan, plans[0])


def test_a_pool_of_nothing_holds_rows_of_nothing():
    plan, _ = plan_decode([[]], [0], chunk_size=16, num_chunks=0)
    assert PlanShape.of(plan).rows == 1
    with pytest.raises(ValueError, match="row 0 has chunk id 0 at position 0"):
        plan_decode([[0]], [1], chunk_size=16, num_chunks=0)
