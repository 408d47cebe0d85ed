"""Attention of heads that see the last tokens only, each by a window of its own."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions, PlanShape, plan_decode
from jax_chunkattn.planning.prefill import QUERY_TILE, PrefillShape, Segment, pack_segments
from jax_chunkattn.tree.prefix_tree import PrefixTree
from pallas_kernels import chunk_attention, prefill_attention
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.implementations import needs_partials
from pallas_kernels.plans import DecodeReads, NewTokens, OwnChunks, PrefillReads
from pallas_kernels.prefill_attention import PREFILL_ATTENTION
from pallas_kernels.stored_kv import StoredKV
from pallas_kernels.windows import Window
from tests import oracle
from tests.interpreted import implementations
from tests.jax_chunkattn.toy import token_tree
from tests.pallas_kernels.test_codecs import decoded, encoded, lossy, mixed_context

CHUNK, CHUNKS, HEADS, KV_HEADS, DIM = 16, 96, 6, 3, 16
WINDOWS = (None, Window(70), Window(33, sinks=20))
OF_HEADS = np.array([1, 0, 2], np.int32)  # the window of each KV head
EVERY_HEAD_THE_SAME = np.array([2, 2, 2], np.int32)
TINY = (Window(5), Window(1, sinks=3), Window(16, sinks=16))  # less than a chunk, or just that
RANDOM = np.random.default_rng(0)
KEYS, VALUES = RANDOM.standard_normal((2, 2, KV_HEADS, CHUNKS, CHUNK, DIM), np.float32)
QUERIES = RANDOM.standard_normal((8, HEADS, DIM), np.float32)
SHAPE = PlanShape(rows=8, items=64, item_chunks=256, private_chunks=16)
TOLERANCE = 2e-6  # as without windows
THOROUGH = [pytest.mark.slow, pytest.mark.thorough]


def options_for(implementation, **how):
    if not needs_partials(implementation):
        return PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)
    return PlannerOptions.for_gpu(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        chunk_size=CHUNK,
        worth_sharing=lambda rows, chunks: rows > 1,
        **how,
    )


def seen(window, position):
    """Positions that a query sees."""
    return [
        key
        for key in range(position + 1)
        if window is None or key < window.sinks or position - key < window.size
    ]


def expected_output(queries, contexts, positions, windows, of_heads):
    """Float64, for a query [Hq, D] of each context (keys and values [Hkv, T, D])."""
    heads, kv_heads = queries.shape[1], len(of_heads)
    group = heads // kv_heads
    output = np.zeros((len(contexts), *queries.shape[1:]))
    for row, ((k, v), position) in enumerate(zip(contexts, positions, strict=True)):
        for head in range(kv_heads):
            tokens = seen(windows[of_heads[head]], position)
            of_head = slice(head * group, (head + 1) * group)
            one = slice(head, head + 1)
            output[row, of_head] = oracle.attend(
                queries[row, of_head], k[one][:, tokens], v[one][:, tokens]
            )
    return output


def batch():
    """Rows of several lengths over a tree, with room for 20 tokens more: tables and lengths."""
    tree = PrefixTree(CHUNKS, CHUNK)
    for prompt in token_tree((1, 150), (2, 37), (3, 20), seed=1):
        tree.insert(prompt)
    for prompt in token_tree((1, 9), seed=2):
        tree.insert(prompt)
    rows = tree.rows()
    for index, row in enumerate(rows):
        tree.reserve(row, 20 + index)
    return [row.chunk_ids for row in rows], [row.num_tokens for row in rows]


attend_decoding = jax.jit(chunk_attention, static_argnames=("implementation", "layer"))


@implementations
@pytest.mark.parametrize(
    ("windows", "of_heads"),
    [
        pytest.param(WINDOWS, OF_HEADS, id="of each head"),
        pytest.param(WINDOWS, EVERY_HEAD_THE_SAME, id="of all heads", marks=pytest.mark.slow),
        pytest.param(TINY, OF_HEADS, id="tiny"),
    ],
)
@pytest.mark.parametrize("steps", [0, pytest.param(7, marks=THOROUGH), 20])
def test_a_row_reads_what_each_head_sees(implementation, windows, of_heads, steps):
    """By one plan, also some tokens after it was made."""
    tables, lengths = batch()
    plan, summary = plan_decode(
        tables,
        lengths,
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=options_for(implementation, max_private_chunks=3),
        at_least=SHAPE,
        windows=windows,
    )
    assert any(one.shared for one in summary.by_window) or windows is TINY
    now = np.zeros(len(QUERIES), np.int32)
    now[: len(tables)] = [length + steps for length in lengths]
    got = attend_decoding(
        QUERIES, KEYS, VALUES, plan, now, layer=1, head_windows=of_heads,
        implementation=implementation,
    )  # fmt: skip
    contexts = [
        tuple(oracle.context(pool[1], table, length) for pool in (KEYS, VALUES))
        for table, length in zip(tables, now, strict=False)
    ]
    expected = expected_output(QUERIES, contexts, now[: len(tables)] - 1, windows, of_heads)
    np.testing.assert_allclose(got[: len(tables)], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(got[len(tables) :], 0)


def segments():
    """New tokens behind prefixes of many lengths, some of them shared, some with none."""
    shared = list(range(12))
    ranges = [(192, 300), (176, 201), (0, 70), (200, 210), (100, 140)]
    tables, fresh = [], iter(range(12, CHUNKS))
    for begin, end in ranges:
        before = shared[: begin // CHUNK]
        tables.append([*before, *(next(fresh) for _ in range(-(-end // CHUNK) - len(before)))])
    return [
        Segment([7] * (end - begin), table, begin, end, begin)
        for (begin, end), table in zip(ranges, tables, strict=True)
    ]


attend_prefilling = jax.jit(
    functools.partial(prefill_attention, query_tile=QUERY_TILE),
    static_argnames=("implementation", "layer"),
)


@implementations
@pytest.mark.parametrize("windows", [WINDOWS, TINY], ids=["long", "tiny"])
def test_a_new_token_reads_what_each_head_sees(implementation, windows):
    packed = segments()
    batch = pack_segments(
        packed,
        num_tokens=256,
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=options_for(implementation),
        at_least=PrefillShape(slots=2048 if needs_partials(implementation) else 0),
        windows=windows,
    )
    queries = np.random.default_rng(3).standard_normal((256, HEADS, DIM), np.float32)
    got = attend_prefilling(
        queries, KEYS, VALUES, batch.plan, layer=1, head_windows=OF_HEADS,
        implementation=implementation,
    )  # fmt: skip
    contexts, positions = [], []
    for segment in packed:
        for position in range(segment.begin, segment.end):
            table = segment.chunk_ids
            context = (oracle.context(pool[1], table, position + 1) for pool in (KEYS, VALUES))
            contexts.append(tuple(context))
            positions.append(position)
    expected = expected_output(queries, contexts, positions, windows, OF_HEADS)
    np.testing.assert_allclose(got[: len(positions)], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(got[len(positions) :], 0)


ATTENTION = AttentionSpec.of(HEADS, KV_HEADS, DIM)


def codes_and_exact(codec):
    """The second layer's pool, encoded; and what its chunks read as."""
    exact = KEYS[1], VALUES[1]
    return encoded(codec, KEYS, VALUES, 1), exact, decoded(codec, *exact)


CODED = [
    pytest.param(WINDOWS, id="long", marks=THOROUGH),
    pytest.param((*TINY[:2], WINDOWS[2]), id="tiny"),
]


@implementations
@pytest.mark.parametrize("windows", CODED)
def test_a_row_reads_its_own_chunk_exact_as_far_as_each_head_sees(implementation, windows):
    tables, lengths = batch()
    stored, exact, codes = codes_and_exact(lossy("int8"))
    plan, _ = plan_decode(  # as the loop has it: without the token that the step writes
        tables,
        [length - 1 for length in lengths],
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=options_for(implementation),
        at_least=SHAPE,
        windows=windows,
    )
    rows, now = len(tables), np.zeros(len(QUERIES), np.int32)
    now[: len(tables)] = [length + 6 for length in lengths]
    slots = np.full(len(QUERIES), rows, np.int32)
    slots[:rows] = np.random.default_rng(0).permutation(rows)
    last = [table[(length - 1) // CHUNK] for table, length in zip(tables, now, strict=False)]
    tails = np.zeros((2, 2, KV_HEADS, rows, CHUNK, DIM), np.float32)
    for tail, pool in zip(tails, (KEYS, VALUES), strict=True):
        tail[:, :, slots[:rows]] = pool[:, :, last]
    own = OwnChunks(jnp.asarray(tails[0]), jnp.asarray(tails[1]), slots)
    reads = DecodeReads(plan, now, own, jnp.asarray(OF_HEADS))
    got = CHUNK_ATTENTION.attend(QUERIES, stored, reads, ATTENTION, implementation=implementation)
    contexts = [
        mixed_context(exact, codes, table, length)
        for table, length in zip(tables, now, strict=False)
    ]
    expected = expected_output(QUERIES, contexts, now[:rows] - 1, windows, OF_HEADS)
    np.testing.assert_allclose(got[:rows], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow_to_compile
@implementations
@pytest.mark.parametrize("windows", CODED)
def test_a_new_token_reads_its_own_chunk_exact_as_far_as_each_head_sees(implementation, windows):
    packed = [
        replace(one, begin=begin, write_from=begin, tokens=[7] * (one.end - begin))
        for one in segments()
        for begin in [one.begin // CHUNK * CHUNK]
    ]
    stored, exact, codes = codes_and_exact(lossy("int8"))
    batch = pack_segments(
        packed,
        num_tokens=320,
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=options_for(implementation),
        num_slots=8,
        windows=windows,
    )
    queries = np.random.default_rng(3).standard_normal((320, HEADS, DIM), np.float32)
    new = np.zeros((2, 320, KV_HEADS, DIM), np.float32)
    contexts, positions = [], []
    for segment in packed:
        for position in range(segment.begin, segment.end):
            place = segment.chunk_ids[position // CHUNK], position % CHUNK
            new[:, len(positions)] = KEYS[1][:, *place], VALUES[1][:, *place]
            contexts.append(mixed_context(exact, codes, segment.chunk_ids, position + 1))
            positions.append(position)
    tokens = NewTokens(jnp.asarray(new[0]), jnp.asarray(new[1]))
    reads = PrefillReads(batch.plan, QUERY_TILE, tokens, jnp.asarray(OF_HEADS))
    got = PREFILL_ATTENTION.attend(queries, stored, reads, ATTENTION, implementation=implementation)
    expected = expected_output(queries, contexts, positions, windows, OF_HEADS)
    np.testing.assert_allclose(got[: len(positions)], expected, rtol=0, atol=TOLERANCE)


def test_windows_of_heads_are_refused_by_a_plan_without_any():
    tables, lengths = batch()
    plan, _ = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=CHUNKS, at_least=SHAPE)
    now = np.ones(len(QUERIES), np.int32)
    with pytest.raises(ValueError, match="made without windows"):
        chunk_attention(QUERIES, KEYS, VALUES, plan, now, head_windows=OF_HEADS)
    stored = StoredKV(jnp.asarray(KEYS), jnp.asarray(VALUES), 1)
    reads = DecodeReads(plan, now, head_windows=jnp.asarray(OF_HEADS))
    with pytest.raises(ValueError, match="heads have windows, and the plan none"):
        CHUNK_ATTENTION.attend(QUERIES, stored, reads, ATTENTION)
    plan, _ = plan_decode(
        tables, lengths, chunk_size=CHUNK, num_chunks=CHUNKS, at_least=SHAPE, windows=WINDOWS
    )
    with pytest.raises(ValueError, match="plan has windows, and the heads none"):
        CHUNK_ATTENTION.attend(QUERIES, stored, DecodeReads(plan, now), ATTENTION)
    reads = DecodeReads(plan, now, head_windows=jnp.asarray(OF_HEADS[:2]))
    with pytest.raises(ValueError, match="windows are of 2 heads, and there are 3"):
        CHUNK_ATTENTION.attend(QUERIES, stored, reads, ATTENTION)
