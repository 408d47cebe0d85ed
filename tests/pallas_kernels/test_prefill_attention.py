from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from pallas_kernels import prefill_attention
from pallas_kernels.implementations import needs_partials
from tests import oracle
from tests.interpreted import implementations, optimised_implementations
from tests.pallas_kernels.test_chunk_attention import naive_attention, write_overflowed


def pack(ranges, chunk_size, num_tokens, seed=0, options=PlannerOptions()):
    """Segments at [begin, end) of sequences with random, disjoint chunks; and the pool's size."""
    random = np.random.default_rng(seed)
    counts = [-(-end // chunk_size) for _, end in ranges]
    num_chunks = sum(counts) + 2
    ids = random.permutation(num_chunks)
    tables = np.split(ids[: sum(counts)], np.cumsum(counts)[:-1])
    segments = [
        Segment([7] * (end - begin), table.tolist(), begin, end, begin)
        for (begin, end), table in zip(ranges, tables, strict=True)
    ]
    batch = pack_segments(
        segments,
        num_tokens=num_tokens,
        chunk_size=chunk_size,
        num_chunks=num_chunks,
        options=options,
    )
    return segments, batch, num_chunks


def planner_options(implementation, heads, kv_heads, chunk_size) -> PlannerOptions:
    if not needs_partials(implementation):
        return PlannerOptions()
    return PlannerOptions.for_gpu(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=24, chunk_size=chunk_size
    )


RANGES = [
    ([(64, 129), (0, 3), (640, 699), (15, 16)], 16, 128),
    ([(0, 1)], 16, 32),
    ([(0, 300)], 64, 512),
    ([(0, 20), (128, 148), (127, 128), (1, 2), (129, 200)], 128, 128),
    ([(1030, 1130)], 16, 100),
]
HEADS = [(6, 2), (4, 4), (8, 1)]
EVERYDAY = {(3, 1)}  # many segments in large chunks; the tests below have grouped heads


def marks_of(row: int, column: int) -> list[pytest.MarkDecorator]:
    """The first of either with all of the other are enough but before a release, without those
    that are simple or whose heads are in an everyday case."""
    if (row, column) in EVERYDAY:
        return []
    if (row and column) or (row, column) in {(0, 1), (1, 0)}:
        return [pytest.mark.slow_to_compile, pytest.mark.thorough]
    return [pytest.mark.slow_to_compile]


CASES = [
    pytest.param(*ranges, *heads, id=f"{ranges[0]} {heads}", marks=marks_of(row, column))
    for row, ranges in enumerate(RANGES)
    for column, heads in enumerate(HEADS)
]


@optimised_implementations
@pytest.mark.parametrize(("ranges", "chunk_size", "num_tokens", "heads", "kv_heads"), CASES)
def test_each_token_sees_its_sequence_up_to_itself(
    ranges, chunk_size, num_tokens, heads, kv_heads, implementation
):
    options = planner_options(implementation, heads, kv_heads, chunk_size)
    segments, batch, num_chunks = pack(ranges, chunk_size, num_tokens, options=options)
    random = np.random.default_rng(1)
    q = random.standard_normal((num_tokens, heads, 24), np.float32)
    keys, values = random.standard_normal((2, 3, kv_heads, num_chunks, chunk_size, 24), np.float32)
    got = prefill_attention(
        q, keys, values, batch.plan, query_tile=QUERY_TILE, layer=1, implementation=implementation
    )
    expected = np.zeros(q.shape)
    token = 0
    for segment in segments:
        for position in range(segment.begin, segment.end):
            k, v = (
                oracle.context(pool[1], segment.chunk_ids, position + 1) for pool in (keys, values)
            )
            expected[token] = oracle.attend(q[token], k, v)
            token += 1
    # 2e-6: the float32 plain softmax on the same data is off by up to 8e-7.
    chex.assert_trees_all_close(got[:token], expected[:token], rtol=0, atol=2e-6)
    chex.assert_trees_all_equal(got[token:], np.zeros_like(q[token:]))


@implementations
def test_scores_are_scaled_then_capped_then_masked(implementation):
    """By flash-attention's rule, with scores of which the softcap bends most; one segment begins
    behind a cached chunk, in the middle of the next."""
    scores = {"scale": 1.0, "softcap": 5.0}
    options = planner_options(implementation, 4, 2, 16)
    segments, batch, num_chunks = pack([(20, 40), (0, 5)], 16, 32, options=options)
    random = np.random.default_rng(1)
    q = random.standard_normal((32, 4, 24), np.float32)
    keys, values = random.standard_normal((2, 1, 2, num_chunks, 16, 24), np.float32)
    how = {"query_tile": QUERY_TILE, "implementation": implementation, **scores}
    got = np.asarray(prefill_attention(q, keys, values, batch.plan, **how), np.float64)
    of_token = [(s.chunk_ids, end) for s in segments for end in range(s.begin + 1, s.end + 1)]
    tables, lengths = zip(*of_token, strict=True)
    problem = q[: len(tables)], keys[0], values[0], tables, np.array(lengths, np.int32)
    exact = oracle.decode_attention(*problem, **scores)
    allowed = np.abs(naive_attention(*problem, **scores).astype(np.float64) - exact)
    assert np.abs(got[: len(tables)] - exact).max() <= 2 * allowed.max() + 2e-7


@implementations
def test_what_overflowed_reaches_no_token_that_does_not_see_it(implementation):
    """Behind the last token of a sequence, and at that token for all before it."""
    options = planner_options(implementation, 4, 2, 16)
    segments, batch, num_chunks = pack([(20, 40), (0, 5)], 16, 32, options=options)
    random = np.random.default_rng(1)
    q = random.standard_normal((32, 4, 24), np.float32)
    keys, values = random.standard_normal((2, 1, 2, num_chunks, 16, 24), np.float32)
    how = {"query_tile": QUERY_TILE, "implementation": implementation, "scale": 1.0, "softcap": 5.0}
    expected = prefill_attention(q, keys, values, batch.plan, **how)
    first, second = (segment.chunk_ids for segment in segments)
    slots = [(first[2], 7), (first[2], 8), (first[2], 9), (second[0], 5), (second[0], 15)]
    keys, values = write_overflowed(keys, values, *zip(*slots, strict=True))
    got = prefill_attention(q, keys, values, batch.plan, **how)
    before = np.arange(32) != 19
    np.testing.assert_array_equal(got[before], expected[before])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_numbers_have_their_types_with_jax_enable_x64(implementation):
    _, batch, num_chunks = pack([(20, 40), (0, 5)], 16, 32)
    q, pool = np.zeros((32, 4, 8), np.float32), np.zeros((1, 2, num_chunks, 16, 8), np.float32)
    how = {"query_tile": QUERY_TILE, "implementation": implementation}
    with jax.enable_x64(True):
        got = jax.eval_shape(lambda: prefill_attention(q, pool, pool, batch.plan, **how))
    assert got.dtype == np.float32


def test_a_softcap_that_is_not_positive_is_refused():
    _, batch, num_chunks = pack([(0, 3)], 16, 32)
    q, pool = np.zeros((32, 1, 8), np.float32), np.zeros((1, 1, num_chunks, 16, 8), np.float32)
    with pytest.raises(ValueError, match=r"softcap must be positive .*, not -1"):
        prefill_attention(q, pool, pool, batch.plan, query_tile=QUERY_TILE, softcap=-1.0)


def test_heads_that_do_not_divide_are_refused():
    _, batch, num_chunks = pack([(0, 3)], 16, 32)
    q, pool = np.zeros((32, 3, 8), np.float32), np.zeros((1, 2, num_chunks, 16, 8), np.float32)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV heads"):
        prefill_attention(q, pool, pool, batch.plan, query_tile=QUERY_TILE)


def test_packing_says_where_every_token_is_written():
    segments, batch, num_chunks = pack([(20, 40), (0, 5)], 16, 32)
    first, second = segments
    expected = [first.chunk_ids[1]] * 12 + [first.chunk_ids[2]] * 8 + [second.chunk_ids[0]] * 5
    np.testing.assert_array_equal(batch.plan.write_chunks, expected + [num_chunks] * 7)
    np.testing.assert_array_equal(batch.positions[:25], [*range(20, 40), *range(5)])
    np.testing.assert_array_equal(batch.plan.write_offsets[:25], batch.positions[:25] % 16)
    np.testing.assert_array_equal(batch.last_token, [19, 24])


def test_what_is_in_the_pool_already_is_not_written_again():
    segment = Segment([9], [4, 2], begin=31, end=32, write_from=32)
    batch = pack_segments([segment], num_tokens=32, chunk_size=16, num_chunks=6)
    np.testing.assert_array_equal(batch.plan.write_chunks, [6] * 32)
    assert batch.positions[0] == 31


def test_segments_that_do_not_fit_are_refused():
    segment = Segment([1] * 20, [0, 1], begin=0, end=20, write_from=0)
    with pytest.raises(ValueError, match="2 segments of 40 tokens do not fit a call of 32 tokens"):
        pack_segments([segment] * 2, num_tokens=32, chunk_size=16, num_chunks=4)
