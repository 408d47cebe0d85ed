"""Plans for GPUs: packed by a rule, cut to fill the device, with slots for partials."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn.planning.options import PACKINGS
from jax_chunkattn.planning.planner import GpuCosts, GpuWork, PlannerOptions, PlanShape, plan_decode
from tests.jax_chunkattn.planning.plan_helpers import (
    CHUNK,
    POOL,
    batches,
    check_coverage,
    check_slots,
    items_of,
)

packings = pytest.mark.parametrize("packing", PACKINGS)


@st.composite
def gpu_options(draw):
    """Devices of all sizes, so that plans are limited by their work as well as by their longest
    program, and programs that cost much or next to nothing."""
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    return PlannerOptions.for_gpu(
        sharing=draw(st.sampled_from([True, True, True, False])),
        worth_sharing=draw(
            st.sampled_from([None, None, lambda rows, chunks: rows > 1, _three_chunks])
        ),
        num_sms=draw(st.sampled_from([1, 6, 132])),
        num_heads=kv_heads * draw(st.sampled_from([1, 3, 4, 16])),
        num_kv_heads=kv_heads,
        chunk_size=CHUNK,
        packing=draw(st.sampled_from(PACKINGS)),
        align=draw(st.sampled_from([1, 64])),
        query_tile=draw(st.sampled_from([4, 64])),
        min_piece_tokens=draw(st.sampled_from([1, 2 * CHUNK])),
        max_private_chunks=draw(st.sampled_from([0, 2])),
        costs=GpuCosts(program_seconds=draw(st.sampled_from([1e-12, 1e-9, 2.7e-6]))),
    )


def _three_chunks(rows, chunks):
    return (rows > 1) & (chunks > 2)


@settings(max_examples=100, deadline=None)
@given(batches(), gpu_options())
def test_every_row_attends_to_its_tokens_once_and_finds_its_partials(batch, options):
    tables, lengths = batch
    gpu = options.gpu
    plan, summary = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=POOL, options=options)
    check_coverage(plan, tables, lengths)
    check_slots(plan.items, plan.partials, len(plan.private_chunks), gpu.group, gpu.align)

    items = items_of(plan)
    full = np.array(lengths) // CHUNK
    private = full - plan.covered_tokens[: len(full)] // CHUNK
    assert summary.shared == any(rows > 1 for _, rows, _ in items) or gpu.tile_rows == 1
    assert summary.chunk_reads == sum(len(chunks) for _, _, chunks in items) + private.sum()
    assert summary.chunk_reads <= summary.unshared_chunk_reads == full.sum()
    assert all(rows <= gpu.tile_rows for _, rows, _ in items)
    sizes = [len(chunks) for _, _, chunks in items]
    assert all(after <= before + 1 for before, after in pairwise(sizes))
    if options.worth_sharing is None:
        assert private.max() <= gpu.max_private_chunks
    assert summary.packing == "none" or summary.shared
    assert summary.seconds is not None


def uniform(*levels):
    """Tables and lengths of a tree: (nodes, chunks of each) by level, the rows last; and N."""
    rows = levels[-1][0]
    tables: list[list[int]] = [[] for _ in range(rows)]
    fresh = 0
    for nodes, chunks in levels:
        for row, table in enumerate(tables):
            first = fresh + row * nodes // rows * chunks
            table += range(first, first + chunks)
        fresh += nodes * chunks
    full = [len(table) for table in tables]
    for row, table in enumerate(tables):
        table.append(fresh + row)
    return tables, [size * 64 + 1 for size in full], fresh + rows


def plan_uniform(*levels, **work):
    tables, lengths, num_chunks = uniform(*levels)
    options = PlannerOptions.for_gpu(**work)
    return plan_decode(tables, lengths, chunk_size=64, num_chunks=num_chunks, options=options)


@packings
def test_a_shared_run_is_cut_to_give_every_worker_a_program(packing):
    """32 heads by 8 pieces of 64 chunks: 256 programs for the 264 that run at once."""
    plan, summary = plan_uniform((1, 64), (32, 0), num_heads=32, num_kv_heads=32, packing=packing)
    assert [(row, rows, len(chunks)) for row, rows, chunks in items_of(plan)] == [(0, 32, 8)] * 8
    assert (summary.shared_items, summary.private_items, summary.chunk_reads) == (1, 0, 64)
    assert PlanShape.of(plan) == PlanShape(32, 16, 256, 16, slots=512)  # tiles of 64 for 32 rows
    assert summary.packing == packing
    assert summary.seconds is not None
    assert summary.unshared_seconds is not None
    assert summary.seconds < summary.unshared_seconds


def test_runs_are_cut_into_pieces_of_nearly_equal_length_and_only_for_idle_workers():
    def sizes(chunks, rows, kv_heads):
        work = {"num_heads": kv_heads, "num_kv_heads": kv_heads}
        plan, _ = plan_uniform((1, chunks), (rows, 0), **work)
        return sorted(len(chunks) for _, _, chunks in items_of(plan))

    assert sizes(65, 32, 32) == [8] * 7 + [9]
    assert sizes(7, 32, 32) == [7]  # pieces of less than 4 chunks are not worth a program
    assert sizes(64, 32, 264) == [64]


def test_a_last_wave_of_few_programs_is_avoided():
    """300 heads on 264 workers: uncut, 36 programs of 64 chunks are left for a second wave."""
    plan, _ = plan_uniform((1, 64), (32, 0), num_heads=300, num_kv_heads=300)
    assert 1 < int(plan.items.count) <= 8


@packings
def test_a_long_row_alone_is_cut_like_a_shared_run(packing):
    plan, summary = plan_uniform((1, 528), num_heads=8, num_kv_heads=8, packing=packing)
    pieces = [len(chunks) for _, _, chunks in items_of(plan)]
    assert sum(pieces) == 528
    assert len(pieces) in (32, 33)  # 8 heads: 33 pieces are a program for each of 264 workers
    assert max(pieces) - min(pieces) <= 1
    assert not summary.shared
    assert summary.reason == "no two rows have a full chunk in common"


def test_short_private_runs_stay_in_the_sequence_first_phase():
    plan, _ = plan_uniform((4, 2))
    assert items_of(plan) == []
    assert plan.partials is not None
    assert int(plan.partials.row_begin[-1]) == 0
    plan, _ = plan_uniform((4, 3))
    assert [(row, rows, len(chunks)) for row, rows, chunks in items_of(plan)] == [
        (row, 1, 3) for row in range(4)
    ]
    np.testing.assert_array_equal(plan.private_chunks[:, 1], 16)  # the tail alone, then padding


def test_rows_are_cut_to_the_query_tile_and_read_the_same_chunks():
    plan, summary = plan_uniform((1, 40), (100, 0), num_heads=32, num_kv_heads=8)
    pieces = {chunks for _, _, chunks in items_of(plan)}
    assert sum(map(len, pieces)) == 40
    assert plan.items.chunks[:40].tolist() == list(range(40))  # once for all seven tiles
    assert {rows for _, rows, _ in items_of(plan)} == {16, 4}
    assert summary.chunk_reads == 7 * 40


@packings
def test_what_saves_no_time_is_not_shared(packing):
    """Two rows behind a prefix of three chunks: either way the device is nearly idle."""
    plan, summary = plan_uniform((1, 3), (2, 0), packing=packing)
    assert not summary.shared
    assert summary.packing == "none"
    assert summary.reason.startswith("sharing saves nothing: an estimated ")
    assert {rows for _, rows, _ in items_of(plan)} == {1}


def test_the_other_reasons_not_to_share():
    _, off = plan_uniform((1, 64), (32, 0), sharing=False)
    assert (off.shared, off.reason) == (False, "sharing is switched off")
    plan, short = plan_uniform((1, 1), (2, 1))
    assert short.reason == "the common prefixes are too short to pay for a work item"
    assert items_of(plan) == []
    assert short.common_tokens == 64


def test_worth_sharing_overrides_the_packing_and_the_estimate():
    plan, summary = plan_uniform((1, 3), (2, 3), worth_sharing=lambda rows, chunks: rows > 1)
    assert summary.shared
    assert summary.packing == "worth_sharing"
    assert (0, 2, (0, 1, 2)) in items_of(plan)


@settings(max_examples=50, deadline=None)
@given(batches(), gpu_options())
def test_a_plan_takes_the_shape_of_the_last_one(batch, options):
    tables, lengths = batch
    kept = {"chunk_size": CHUNK, "num_chunks": POOL, "options": options}
    plan, _ = plan_decode(tables, lengths, **kept)
    shape = PlanShape.of(plan)
    assert plan.partials is not None
    assert shape.slots == plan.partials.slots.shape[0] > 0
    smaller, _ = plan_decode(tables[:1], lengths[:1], **kept, at_least=shape)
    assert PlanShape.of(smaller) == shape
    assert smaller.partials is not None
    assert smaller.partials.row_begin.shape == (shape.rows + 1,)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ({"packing": "none"}, "unknown packing 'none'; known: cost, fasttree, pat"),
        ({"num_heads": 6, "num_kv_heads": 4}, "6 query heads are not a multiple of 4 KV heads"),
        ({"align": 0}, "align must be at least 1, got 0"),
    ],
)
def test_bad_work_is_refused(work, message):
    with pytest.raises(ValueError, match=message):
        GpuWork(**work)


def test_a_plan_for_another_chunk_size_is_refused():
    options = PlannerOptions.for_gpu(chunk_size=32)
    with pytest.raises(ValueError, match="for chunks of 32 tokens, the tables' have 64"):
        plan_decode([[0]], [1], chunk_size=64, num_chunks=1, options=options)


def test_options_can_be_changed_like_any_dataclass():
    options = PlannerOptions.for_gpu(num_heads=32, num_kv_heads=8)
    assert options.gpu == GpuWork(num_heads=32, num_kv_heads=8)
    assert not dataclasses.replace(options, sharing=False).sharing
