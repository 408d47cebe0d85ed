"""Which chunks queries choose, and attention to those alone."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions, plan_decode
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import codec_of
from pallas_kernels.coded_kv import CodedKV
from pallas_kernels.plans import ChosenChunks, DecodeReads
from pallas_kernels.selection import (
    Asking,
    ChunkSelector,
    ItemColumns,
    Landmarks,
    RowChoice,
    asking_rows,
    choose,
    selected_rows,
)
from pallas_kernels.selection.descent import descend
from pallas_kernels.selection.estimates import CompiledEstimate, KeyScores
from pallas_kernels.selection.landmarks import KEY_CODES
from pallas_kernels.selection.scoring import chunk_scores
from pallas_kernels.stored_kv import StoredKV
from tests import oracle
from tests.interpreted import implementations, skip_unless_there
from tests.pallas_kernels.test_windows import (
    CHUNK,
    CHUNKS,
    DIM,
    HEADS,
    KEYS,
    KV_HEADS,
    QUERIES,
    SHAPE,
    VALUES,
    batch,
    options_for,
)

LAYER = jnp.int32(1)
COLUMNS = 20
ATTENTION = AttentionSpec.of(HEADS, KV_HEADS, DIM)
TOLERANCE = 2e-6  # as of attention to everything


def published(scores: np.ndarray, k: int) -> set[int]:
    """Blocks of keys that HiP keeps for one query of one head: Algorithm 1 of arXiv 2406.09827,
    without the first and last tokens, which are kept beside these.

    `scores [n, b]` are those of all keys, by block.
    """
    n, k = len(scores), int(k)
    nodes = [(j * n // k, (j + 1) * n // k - 1) for j in range(k)]
    while any(last > first for first, last in nodes):
        branches = []
        for first, last in nodes:
            middle = (first + last + 1) // 2
            branches += [(first, middle - 1)] * (first < middle) + [(middle, last)]
        branches.sort(key=lambda branch: -scores[(branch[0] + branch[1]) // 2].max())
        nodes = branches[:k]
    return {first for first, _ in nodes}


@pytest.mark.parametrize("block", [1, 2, 4, 16, 64])
def test_descent_keeps_the_blocks_of_the_paper(block):
    """Of one head, where nothing is shared."""
    random, columns, most = np.random.default_rng(block), 96, 9
    keys = jnp.asarray(random.standard_normal((1, 1, columns, block, 8), np.float32))
    queries = random.standard_normal((40, 1, 8), np.float32)
    candidates = np.array([*range(1, 21), *range(50, 70)], np.int32)
    wanted = np.minimum(random.integers(1, most + 1, 40).astype(np.int32), candidates)
    ids = random.permutation(columns).astype(np.int32)
    stored = StoredKV(keys, keys, 0)
    asking = of_one_table(ids, len(queries))
    run = jax.jit(
        lambda q, candidates, wanted: descend(
            q,
            asking,
            KeyScores(stored.gather_keys),
            AttentionSpec.of(1, 1, 8),
            3,
            candidates,
            wanted,
            most=most,
        )
    )
    found = np.asarray(run(jnp.asarray(queries), jnp.asarray(candidates), jnp.asarray(wanted)))
    exact, kept = np.asarray(keys)[0, 0, ids], 0
    for q, n, k, columns_found in zip(queries[:, 0], candidates, wanted, found, strict=True):
        blocks = published(exact[3 : 3 + n] @ q, k)
        assert {3 + one for one in blocks} == set(columns_found[:k].tolist())
        assert (columns_found[k:] == columns).all()
        kept += len(blocks) < n
    assert kept > 30  # most leave some out


def of_one_table(ids: np.ndarray, number: int) -> Asking:
    """So many queries that ask at the end of the same sequence, with nothing shared."""
    plan, _ = plan_decode([ids.tolist()], [0], chunk_size=1, num_chunks=len(ids))
    every = jnp.arange(number, dtype=jnp.int32)
    return Asking(
        every,
        jnp.int32(number),
        jnp.full(number, len(ids) - 1, jnp.int32),
        jnp.zeros(number, jnp.int32),
        jnp.zeros(number, jnp.int32),
        jnp.asarray(ids)[None],
        jax.tree.map(jnp.asarray, plan.items),
        jnp.zeros(plan.items.row_begin.shape, jnp.int32),
    )


@functools.cache
def planned(implementation: str = "xla"):
    """A tree of rows: its plan, and how many tokens each row has with the one to come."""
    tables, lengths = batch()
    plan, summary = plan_decode(
        tables,
        lengths,
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=options_for(implementation, max_private_chunks=3),
        at_least=SHAPE,
        columns=COLUMNS,
    )
    assert summary.shared
    now = np.zeros(len(QUERIES), np.int32)
    now[: len(tables)] = lengths
    return plan, jnp.asarray(now)


def choose_all(selector: ChunkSelector, asks, *, compiled: bool):
    """What the rows choose that ask: columns [A, K], and how many of them each reads."""
    plan, lengths = planned()
    assert plan.tables is not None
    chunk, tables = lengths // CHUNK, plan.tables
    stored = StoredKV(jnp.asarray(KEYS), jnp.asarray(VALUES), LAYER)
    kept = Landmarks.of(selector, encoded=False)
    landmarks = kept.make(stored.keys)

    @jax.jit
    def run(q, asks):
        items = jax.tree.map(jnp.asarray, plan.items)
        clipped = jnp.minimum(tables, CHUNKS - 1)
        asking = asking_rows(asks, chunk, clipped, items, ItemColumns.of(items, clipped))
        known = landmarks, stored, LAYER
        estimate = kept.compiled_estimate(*known) if compiled else kept.estimate(*known)
        assert estimate is not None
        return choose(q, asking, estimate, ATTENTION, selector)

    number = selector.counts(COLUMNS)[np.asarray(chunk)]
    return np.asarray(run(jnp.asarray(QUERIES), jnp.asarray(asks))), number


def best_by_definition(selector: ChunkSelector, row: int) -> np.ndarray:
    """What a row's chunks are worth, float64 [chunks before its own]."""
    plan, lengths = planned()
    assert plan.tables is not None
    ids = plan.tables[row][: int(lengths[row]) // CHUNK]
    if not len(ids):
        return np.zeros(0)
    keys = KEYS[int(LAYER)].astype(np.float64)[:, ids]
    queries = QUERIES[row].reshape(KV_HEADS, -1, DIM).astype(np.float64) * DIM**-0.5
    if selector.policy == "scores":
        kept = Landmarks.of(selector, encoded=False)
        codes = kept.make(jnp.asarray(KEYS[int(LAYER)][:, ids]))
        keys = np.asarray(KEY_CODES.decode(codes), np.float64)
        best = np.einsum("hgd,hpcd->hgpc", queries, keys).max(axis=-1)
    else:
        ends = [np.einsum("hgd,hpd->hgpd", queries, end) for end in (keys.min(2), keys.max(2))]
        best = np.maximum(*ends).sum(axis=-1)
    weights = np.exp(best - best.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=(0, 1))


@pytest.mark.parametrize("by", ["xla", "native"])
@pytest.mark.parametrize(
    ("policy", "keep"),
    [
        ("scores", 0.3),
        pytest.param("scores", 0.6, marks=pytest.mark.slow),
        ("bounds", 0.6),
        pytest.param("bounds", 0.3, marks=pytest.mark.slow),
    ],
)
def test_a_query_chooses_the_best_chunks_of_its_own_sequence(policy, keep, by):
    """Whoever else asks, and whichever chunks it has in common with others."""
    skip_unless_there(by)
    selector = ChunkSelector(keep, policy, sinks=1, recent=1, whole=0)
    _, lengths = planned()
    everyone = np.asarray(lengths) > 0
    some = everyone & (np.arange(len(everyone)) % 3 == 1)
    for asks in (everyone, some):
        columns, number = choose_all(selector, asks, compiled=by == "native")
        for place, row in enumerate(np.nonzero(asks)[0].tolist()):
            own = int(lengths[row]) // CHUNK
            always = {0, max(own - 1, 0), own}
            worth = best_by_definition(selector, row)
            worth[[column for column in always if column < own]] = -1
            chosen = np.argsort(-worth, kind="stable")[: number[row] - len(always)]
            assert columns[place, : number[row]].tolist() == sorted(always | {*chosen.tolist()})
            assert (columns[place, number[row] :] == COLUMNS).all()


@pytest.mark.parametrize(
    ("codec", "softcap"),
    [
        ("int4", 2.0),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in ("int8", "int4", "int2")),
    ],
)
def test_the_compiled_kernel_scores_the_codes_of_a_pool_as_they_are_read(codec, softcap):
    """Where the pool has codes of its own there are no others; the first token's may be finer."""
    skip_unless_there("native")
    plan, lengths = planned()
    assert plan.tables is not None
    pool = coded(codec)
    attention = replace(ATTENTION, softcap=softcap)
    kept = Landmarks.of(ChunkSelector(0.3), encoded=True)
    tables, asks = jnp.minimum(plan.tables, CHUNKS - 1), lengths > 0

    @functools.partial(jax.jit, static_argnums=1)
    def score(q, compiled):
        items = jax.tree.map(jnp.asarray, plan.items)
        columns = ItemColumns.of(items, tables)
        asking = asking_rows(asks, lengths // CHUNK, tables, items, columns)
        known = {}, pool, LAYER
        estimate = kept.compiled_estimate(*known) if compiled else kept.estimate(*known)
        assert estimate is not None
        assert isinstance(estimate, CompiledEstimate) == compiled
        return chunk_scores(q, asking, estimate, attention)

    exact, found = (np.asarray(score(jnp.asarray(QUERIES), compiled)) for compiled in (False, True))
    assert exact.sum(axis=1).max() == pytest.approx(HEADS)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)  # queries are rounded to 16 bits


def coded(name: str) -> CodedKV:
    """The keys and values as codes."""
    codec = codec_of(name)
    assert codec is not None
    keys, values = codec.keys.encode(jnp.asarray(KEYS)), codec.values.encode(jnp.asarray(VALUES))
    return CodedKV(keys, values, LAYER, codec, CHUNK, DIM)


def test_codes_that_the_compiled_kernel_does_not_score_are_left_to_xla():
    kept = Landmarks.of(ChunkSelector(0.3), encoded=True)
    assert kept.compiled_estimate({}, coded("fp8"), LAYER) is None
    stored = StoredKV(jnp.asarray(KEYS), jnp.asarray(VALUES), LAYER)
    assert Landmarks("all keys").compiled_estimate({}, stored, LAYER) is None


@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_items_of_which_rows_read_parts_are_refused_by_those_who_read_tiles(implementation):
    skip_unless_there(implementation)
    plan, lengths = planned("pallas_triton")
    items, rows = jax.tree.map(jnp.asarray, plan.items), len(lengths)
    part = ChosenChunks(
        jnp.zeros(items.chunks.shape, jnp.int32), jnp.ones((rows, COLUMNS), jnp.bool_)
    )
    reads = DecodeReads(replace(plan, items=replace(items, chosen=part)), lengths)
    stored = StoredKV(jnp.asarray(KEYS), jnp.asarray(VALUES), LAYER)
    queries = jnp.asarray(QUERIES)
    with pytest.raises(ValueError, match=f"read parts of items, which '{implementation}' does not"):
        CHUNK_ATTENTION.attend(queries, stored, reads, ATTENTION, implementation=implementation)


@implementations
@pytest.mark.parametrize(
    "alike", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["alike", "apart"]
)
def test_rows_attend_to_what_they_have_chosen_and_to_nothing_else(implementation, alike):
    """Where they agree they read it in common."""
    plan, lengths = planned(implementation)
    assert plan.tables is not None
    tables = plan.tables
    rows, random = int((np.asarray(lengths) > 0).sum()), np.random.default_rng(4)
    columns = np.full((len(lengths), 8), COLUMNS, np.int32)
    number = np.zeros(len(lengths), np.int32)
    same = random.permutation(COLUMNS)
    for row in range(rows):
        own = int(lengths[row]) // CHUNK
        order = same[same < own] if alike else random.permutation(own)
        before = order[: 4 + row % 3] if alike else order[: row % 7]
        columns[row, : len(before) + 1] = sorted([*before, own])
        number[row] = len(before) + 1
    columns, number = jnp.asarray(columns), jnp.asarray(number)
    stored = StoredKV(jnp.asarray(KEYS), jnp.asarray(VALUES), LAYER)

    @jax.jit
    def attend(q, columns, number, chosen):
        items, clipped = jax.tree.map(jnp.asarray, plan.items), jnp.minimum(tables, CHUNKS - 1)
        selected = selected_rows(
            plan,
            RowChoice(columns, number, lengths // CHUNK),
            clipped,
            ItemColumns.of(items, clipped),
            chosen,
            group=HEADS // KV_HEADS if alike else 10_000,  # which makes items cost too much
            chunk_size=CHUNK,
            num_chunks=CHUNKS,
            compiled=implementation == "native",
        )
        reads = DecodeReads(selected, jnp.where(lengths > 0, lengths + 1, 0))
        how = {"implementation": implementation}
        got = CHUNK_ATTENTION.attend(q, stored, reads, ATTENTION, **how)
        return got, selected.items, selected.tiles

    for selective in (True, False):
        got, items, tiles = attend(jnp.asarray(QUERIES), columns, number, jnp.asarray(selective))
        assert (tiles is None) == (plan.partials is not None)
        if tiles is None:
            assert (items.count > 0) == (alike or not selective)
            reads = int(items.chunk_count.sum())
            assert 0 < reads < int(plan.items.chunk_count.sum()) or not (alike and selective)
        else:
            assert (items.count > 0) == (not selective)
            assert (tiles.count > 0) == (alike and selective)
        for row in range(rows):
            read = np.asarray(columns[row][: number[row]])
            if not selective:
                read = np.arange(int(lengths[row]) // CHUNK + 1)
            tokens = (read[:, None] * CHUNK + np.arange(CHUNK)).ravel()
            here = tokens <= int(lengths[row])
            ids = tables[row][read]
            k, v = (
                pool[int(LAYER)][:, ids].reshape(KV_HEADS, -1, DIM)[:, here].astype(np.float64)
                for pool in (KEYS, VALUES)
            )
            np.testing.assert_allclose(
                got[row], oracle.attend(QUERIES[row], k, v), rtol=0, atol=TOLERANCE
            )
        assert not np.asarray(got[rows:]).any()


def test_agreement_is_what_rows_read_together_beside_what_one_of_them_reads():
    """Three rows behind six chunks; two of them go on behind three more."""
    shared, longer = list(range(6)), [*range(6), 6, 7, 8]
    tables = np.array([[*longer, 9], [*longer, 10], [*shared, 11, 12, 13, 14]], np.int32)
    options = PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)
    plan, _ = plan_decode(tables.tolist(), [39] * 3, chunk_size=4, num_chunks=16, options=options)
    items = jax.tree.map(jnp.asarray, plan.items)
    tables = jnp.pad(jnp.asarray(tables), ((0, plan.num_rows - 3), (0, 0)), constant_values=15)
    columns = jnp.array([[0, 1, 6, 9], [0, 2, 6, 9], [0, 1, 2, 9]], jnp.int32)
    columns = jnp.pad(columns, ((0, plan.num_rows - 3), (0, 0)))
    number = jnp.pad(jnp.full(3, 4, jnp.int32), (0, plan.num_rows - 3))

    @jax.jit
    def agreement(items):
        choice = RowChoice(columns, number, jnp.full(len(number), 9, jnp.int32))
        return choice.agreement(ItemColumns.of(items, tables), 10)

    together, each = agreement(items)
    assert together == 3 + 1  # chunks 0, 1 and 2; chunk 6
    assert each == pytest.approx((2 + 2 + 3) / 3 + (1 + 1) / 2)


def test_a_share_of_all_is_all():
    assert (ChunkSelector(1.0).counts(50) == np.arange(1, 51)).all()


def test_counts_are_the_share_and_at_least_one_more_than_what_is_read_always():
    selector = ChunkSelector(0.2, sinks=1, recent=3, whole=0)
    assert selector.counts(40).tolist()[:7] == [1, 2, 3, 4, 5, 6, 6]
    assert selector.counts(40)[39] == 8
    assert selector.counts(300)[-1] == 60
    assert selector.most_chosen(300) == 55


def test_queries_with_few_chunks_before_them_read_all():
    selector = ChunkSelector(0.1, whole=32)
    assert selector.counts(40).tolist() == [*range(1, 33), *[4] * 8]
    assert (selector.most_read(40), selector.most_read(400)) == (32, 40)
    assert selector.most_chosen(40) == 1
    assert selector.most_chosen(20) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0.0}, "above 0 and at most 1"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"policy": "best"}, "unknown policy 'best'; known: scores, bounds, hip"),
        ({"refresh": 0}, "refresh must be at least 1"),
        ({"recent": -1}, "recent must be at least 0"),
        ({"dense_layers": (-2,)}, "numbers from 0"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(ChunkSelector(0.2), **wrong)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (ChunkSelector(0.2, refresh=5), "do not divide a chunk of 16 tokens"),
        (ChunkSelector(0.2, dense_layers=(1, 4)), "layer 4 is to read everything"),
    ],
)
def test_a_selector_is_refused_by_what_it_does_not_fit(selector, message):
    with pytest.raises(ValueError, match=message):
        selector.check(16, 4)
