"""Clustered heads: who is in a cluster, whose keys are kept, and attention by the definition."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions, plan_decode
from jax_chunkattn.planning.prefill import QUERY_TILE
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.clusters import ClusteredKV, HeadClusters, KeySlots, representatives_of
from pallas_kernels.clusters.membership import cluster, head_distances, medoids
from pallas_kernels.codecs import codec_of
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.implementations import AttentionShapes, ImplementationError, needs_partials
from pallas_kernels.plans import DecodeReads, NewTokens, OwnChunks, PrefillReads
from pallas_kernels.prefill_attention import PREFILL_ATTENTION
from pallas_kernels.stored_kv import StoredKV
from pallas_kernels.targets import H200, use_target
from pallas_kernels.triton_shape import KernelShape
from tests.interpreted import implementations_of_clusters
from tests.jax_chunkattn.planning.plan_helpers import SHARE_ALL
from tests.jax_chunkattn.rule import clusters as definition
from tests.pallas_kernels.test_codecs import assert_as_exact_as_plain
from tests.pallas_kernels.test_prefill_attention import pack

CHUNK = 16
DIM = 8
THOROUGH = [pytest.mark.slow, pytest.mark.thorough]


def random_representatives(random, heads: int, count: int) -> np.ndarray:
    """Of `count` clusters by chance, none empty, some head of each."""
    label = np.append(np.arange(count), random.integers(0, count, heads - count))
    label = random.permutation(label)
    of = {one: random.choice(np.flatnonzero(label == one)) for one in range(count)}
    return np.array([of[one] for one in label.tolist()], np.int32)


@pytest.mark.parametrize("heads", [2, 5, pytest.param(12, marks=pytest.mark.slow)])
def test_nearest_clusters_are_joined_and_medoids_attend(heads):
    random = np.random.default_rng(heads)
    points = random.standard_normal((heads, 3))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1).astype(np.float32)
    for count in range(1, heads + 1):
        labels = cluster(jnp.asarray(distance), jnp.int32(count))
        expected = definition.clusters_of(distance, count)
        assert [np.flatnonzero(labels == first).tolist() for first in np.unique(labels)] == sorted(
            expected
        )
        found = np.asarray(medoids(jnp.asarray(distance), labels))
        for one in expected:
            assert set(found[one]) == {definition.medoid(distance, one)}


def test_heads_are_as_far_apart_as_their_weights_in_total_variation():
    random = np.random.default_rng(0)
    seen = np.tril(np.ones((CHUNK, CHUNK), bool))
    scores = np.where(seen, random.standard_normal((4, CHUNK, CHUNK)), -np.inf)
    weights = definition.softmax(scores).astype(np.float32)
    weights[3] = weights[1]
    weights[2] = np.eye(CHUNK)  # each token attends to itself alone
    distance = np.asarray(head_distances(jnp.asarray(weights)))
    np.testing.assert_allclose(distance[0, 2], 1 - np.mean(np.diag(weights[0])), atol=1e-6)
    assert distance[1, 3] == 0
    assert 0.1 < distance[0, 1] < 1
    np.testing.assert_array_equal(distance, distance.T)
    one = np.asarray(head_distances(jnp.ones((3, 1, 1), jnp.float32)))  # a chunk of one token
    np.testing.assert_array_equal(one, np.zeros((3, 3)))
    none = jnp.full((2, 1, 1), jnp.nan, jnp.float32)
    np.testing.assert_array_equal(head_distances(none), 1 - np.eye(2))


@pytest.mark.parametrize(
    "membership",
    ["medoid", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lowest", "random"))],
)
def test_each_cluster_has_one_head_that_attends(membership):
    random = np.random.default_rng(1)
    q, k = (random.standard_normal((CHUNK, heads, DIM)).astype(np.float32) for heads in (6, 3))
    attention = AttentionSpec.of(6, 3, DIM)
    wide = np.repeat(k, 2, axis=1)
    for count in range(1, 7):
        arrays = jnp.asarray(q), jnp.asarray(k), jnp.int32(count)
        found = np.asarray(representatives_of(*arrays, attention, membership))
        assert len(np.unique(found)) == count
        assert (found[found] == found).all()  # it attends for itself
        if membership == "medoid":
            assert found.tolist() == definition.representatives(q, wide, count, DIM**-0.5)
        if membership == "lowest":
            assert all(one == np.flatnonzero(found == one)[0] for one in np.unique(found))
    assert found.tolist() == list(range(6))


@pytest.mark.parametrize("group", [1, 2, 8])
def test_slots_hold_the_keys_of_those_that_attend(group):
    heads = GroupedHeads(8 * (group > 1) or 4, (8 // group) if group > 1 else 4)
    random = np.random.default_rng(group)
    for count in range(1, heads.query_heads + 1):
        slots = KeySlots.of(HeadClusters((count, heads.query_heads)), heads)
        assert slots.counts == (min(count, heads.kv_heads), heads.kv_heads)
        of = random_representatives(random, heads.query_heads, count)
        place = np.asarray(slots.of_heads(jnp.asarray(of)))
        assert place.max() < slots.counts[0]
        kept = np.asarray(slots.kept(jnp.asarray(of)))
        np.testing.assert_array_equal(kept[place] // group, of // group)
        assert set(kept[place]) <= set(of)
    assert slots.begins == (0, slots.counts[0])
    begin, end = slots.counts[0], slots.total
    assert slots.places(jnp.int32(1)).tolist() == list(range(begin, end))


def stored_for(slots, of_chunk, keys, values):
    """Layer 1 of a pool, of keys [Hkv, N, C, D] and values of two layers: `of_chunk` has each
    chunk's representatives. What no head reads is no number."""
    group, query_heads = slots.heads.group, slots.heads.query_heads
    kept = np.full((slots.total, *keys.shape[1:]), np.nan, keys.dtype)
    representatives, head_slots = np.zeros((2, 2, keys.shape[1], query_heads), np.uint8)
    for chunk, of in of_chunk.items():
        place = np.asarray(slots.of_heads(jnp.asarray(of)))
        representatives[1, chunk], head_slots[1, chunk] = of, place
        for head, slot in zip(of.tolist(), place.tolist(), strict=True):
            kept[slots.begins[1] + slot, chunk] = keys[head // group, chunk]
    maps = jnp.asarray(representatives), jnp.asarray(head_slots)
    return ClusteredKV(jnp.asarray(kept), jnp.asarray(values), *maps, jnp.int32(1), slots)


def by_head(of, keys, values):
    """Keys and values [Hkv, ...] as each query head reads them, whose representatives are `of`."""
    group = len(of) // len(keys)
    return keys[of // group], np.repeat(values, group, axis=0)


def clustered_tree(group: int, count: int, seed: int, dtype: str = "float32", size: int = CHUNK):
    """Two roots with clusters of their own, of three levels, with rows that end anywhere: operands
    of attention, and what each row reads: its representatives, and keys and values by head."""
    random = np.random.default_rng(seed)
    kv_heads = 4 if group < 8 else 2
    heads = GroupedHeads(group * kv_heads, kv_heads)
    clusters = HeadClusters((heads.query_heads, count))
    slots, num_chunks = KeySlots.of(clusters, heads), 24
    roots = [random_representatives(random, heads.query_heads, count) for _ in range(2)]
    ids = iter(random.permutation(num_chunks).tolist())
    tables, root_of = [], {}
    for of in roots:
        root, middle = next(ids), next(ids)
        for chunks in ([root, middle], [root, middle, next(ids)], [root]):
            tables.append([*chunks, next(ids)])
            root_of |= dict.fromkeys(tables[-1], of)
    lengths = [len(table) * size - int(random.integers(0, size)) for table in tables]
    pool = 2, kv_heads, num_chunks, size, DIM
    keys, values = random.standard_normal((2, *pool)).astype(dtype)
    stored = stored_for(slots, root_of, keys[1], values)
    read = [(root_of[table[0]], keys[1][:, table], values[1][:, table]) for table in tables]
    return stored, tables, lengths, read, random


def options_for(implementation: str, heads: int, size: int) -> PlannerOptions:
    """As for a pool of a KV head for each query head, where all that can be shared is."""
    if not needs_partials(implementation):
        return SHARE_ALL
    return PlannerOptions.for_gpu(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=DIM,
        chunk_size=size,
        worth_sharing=SHARE_ALL.worth_sharing,
    )


def as_tokens(chunks: np.ndarray) -> np.ndarray:
    return chunks.reshape(len(chunks), -1, chunks.shape[-1])


@implementations_of_clusters
@pytest.mark.parametrize(
    ("group", "count", "dtype", "size", "own"),
    [
        (1, 2, "float32", CHUNK, False),
        pytest.param(1, 4, "bfloat16", CHUNK, True, marks=pytest.mark.slow),
        (2, 3, "float32", 64, True),
        pytest.param(2, 3, "bfloat16", CHUNK, False, marks=pytest.mark.slow),
        pytest.param(4, 5, "float32", CHUNK, True, marks=THOROUGH),
        pytest.param(4, 5, "bfloat16", 128, True, marks=pytest.mark.slow),
        pytest.param(8, 1, "float32", CHUNK, True, marks=pytest.mark.slow),
    ],
)
def test_attention_is_the_definitions(implementation, group, count, dtype, size, own):
    tree = clustered_tree(group, count, group + count, dtype, size)
    stored, tables, lengths, read, random = tree
    heads, rows = stored.slots.heads.query_heads, len(tables)
    plan, summary = plan_decode(
        tables,
        [length - own for length in lengths],
        options=options_for(implementation, heads, size),
        chunk_size=size,
        num_chunks=stored.num_chunks,
    )
    assert summary.shared
    padding = [0] * (plan.num_rows - rows)
    q = random.standard_normal((plan.num_rows, heads, DIM)).astype(dtype)
    for row, (of, _, _) in enumerate(read):
        q[row] = q[row, of]
    wide = [by_head(*one) for one in read]
    last = None
    if own:
        tails = np.full((2, 2, heads, rows, size, DIM), np.nan, dtype)  # another layer's are none
        tails[:, 1] = np.stack([[x[:, -1] for x in one] for one in wide], axis=2)
        slots = np.array([*range(rows), *(rows for _ in padding)], np.int32)
        last = OwnChunks(jnp.asarray(tails[0]), jnp.asarray(tails[1]), slots)
        nowhere = stored.keys.at[:, np.array([table[-1] for table in tables])].set(jnp.nan)
        stored = replace(stored, keys=nowhere)
    found = CHUNK_ATTENTION.attend(
        jnp.asarray(q),
        stored,
        DecodeReads(plan, jnp.asarray(lengths + padding, jnp.int32), last),
        AttentionSpec.of(heads, heads, DIM),
        implementation=implementation,
    )
    contexts = [
        [as_tokens(x)[:, :length] for x in one] for one, length in zip(wide, lengths, strict=True)
    ]
    assert_as_exact_as_plain(found[:rows], q[:rows], contexts)
    np.testing.assert_array_equal(found[rows:], 0)


@implementations_of_clusters
@pytest.mark.parametrize(
    ("group", "dtype", "size"),
    [
        pytest.param(1, "bfloat16", 64, marks=pytest.mark.slow),
        (2, "float32", 16),
        pytest.param(4, "float32", 32, marks=pytest.mark.slow),
    ],
)
def test_new_tokens_read_clusters_before_their_own_chunk(implementation, group, dtype, size):
    random, kv_heads = np.random.default_rng(group), 2
    heads = GroupedHeads(group * kv_heads, kv_heads)
    slots = KeySlots.of(HeadClusters((1, heads.query_heads - 1)), heads)
    options = options_for(implementation, heads.query_heads, size)
    ranges = [(4 * size, 6 * size + 1), (0, 3), (9 * size, 9 * size + 20), (size, size + 4)]
    segments, batch, num_chunks = pack(ranges, size, 192, options=options)
    pool = 2, kv_heads, num_chunks, size, DIM
    keys, values = random.standard_normal((2, *pool)).astype(dtype)
    q = random.standard_normal((192, heads.query_heads, DIM)).astype(dtype)
    new = np.full((2, *q.shape), np.nan, dtype)
    new[1] = 1e3  # values of padding are finite, as those of the model are made
    root_of, contexts = {}, []
    for segment in segments:
        of = random_representatives(random, heads.query_heads, slots.counts[1])
        root_of |= dict.fromkeys(segment.chunk_ids[: segment.end // size], of)
        table = segment.chunk_ids
        wide = [as_tokens(x) for x in by_head(of, keys[1][:, table], values[1][:, table])]
        for position in range(segment.begin, segment.end):
            token = len(contexts)
            q[token] = q[token, of]
            new[:, token] = [x[:, position] for x in wide]
            contexts.append([x[:, : position + 1] for x in wide])
    found = PREFILL_ATTENTION.attend(
        jnp.asarray(q),
        stored_for(slots, root_of, keys[1], values),
        PrefillReads(batch.plan, QUERY_TILE, NewTokens(jnp.asarray(new[0]), jnp.asarray(new[1]))),
        AttentionSpec.of(heads.query_heads, heads.query_heads, DIM),
        implementation=implementation,
    )
    tokens = len(contexts)
    assert_as_exact_as_plain(found[:tokens], q[:tokens], contexts)
    np.testing.assert_array_equal(found[tokens:], 0)


def test_as_many_clusters_as_heads_are_the_heads_to_the_last_bit_or_so():
    """XLA may round sums of another program otherwise; an engine runs the one without clusters."""
    stored, tables, lengths, _, random = clustered_tree(1, 4, seed=3)
    heads = stored.slots.heads.query_heads
    plan, _ = plan_decode(
        tables, lengths, options=SHARE_ALL, chunk_size=CHUNK, num_chunks=stored.num_chunks
    )
    itself = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.uint8), stored.head_slots.shape)
    begin = stored.slots.begins[1]
    keys = jnp.nan_to_num(stored.keys)
    clustered = ClusteredKV(keys, stored.values, itself, itself, jnp.int32(1), stored.slots)
    plain = StoredKV(jnp.stack([keys[begin:]] * 2), stored.values, jnp.int32(1))
    q = jnp.asarray(random.standard_normal((plan.num_rows, heads, DIM)), jnp.float32)
    padded = jnp.asarray(lengths + [0] * (plan.num_rows - len(lengths)), jnp.int32)

    @jax.jit
    def attend(kv):
        attention = AttentionSpec.of(heads, heads, DIM)
        return CHUNK_ATTENTION.attend(
            q, kv, DecodeReads(plan, padded), attention, implementation="xla"
        )

    np.testing.assert_allclose(attend(clustered), attend(plain), rtol=0, atol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_codes_of_clustered_heads_are_read_as_what_they_decode_to(implementation):
    stored, tables, lengths, _, random = clustered_tree(2, 3, seed=5)
    codec = codec_of("int8")
    assert codec is not None
    keys = codec.keys.encode(jnp.nan_to_num(jnp.asarray(stored.keys)))
    values = codec.values.encode(jnp.asarray(stored.values))
    coded = replace(
        stored, keys=keys, values=values, codec=codec, coded_sizes=(stored.chunk_size, DIM)
    )
    decoded = replace(stored, keys=codec.keys.decode(keys), values=codec.values.decode(values))
    assert (coded.num_chunks, coded.chunk_size) == (stored.num_chunks, stored.chunk_size)
    heads = stored.slots.heads.query_heads
    plan, _ = plan_decode(
        tables, lengths, options=SHARE_ALL, chunk_size=CHUNK, num_chunks=stored.num_chunks
    )
    q = jnp.asarray(random.standard_normal((plan.num_rows, heads, DIM)), jnp.float32)
    padded = jnp.asarray(lengths + [0] * (plan.num_rows - len(lengths)), jnp.int32)
    found, right = (
        CHUNK_ATTENTION.attend(
            q,
            kv,
            DecodeReads(plan, padded),
            AttentionSpec.of(heads, heads, DIM),
            implementation=implementation,
        )
        for kv in (coded, decoded)
    )
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-6)
    exact = CHUNK_ATTENTION.attend(
        q,
        replace(stored, keys=jnp.nan_to_num(stored.keys)),
        DecodeReads(plan, padded),
        AttentionSpec.of(heads, heads, DIM),
        implementation=implementation,
    )
    assert 1e-4 < np.abs(exact - right).max() < 0.1


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((), "each layer has at least one cluster"),
        ((2, 0), "each layer has at least one cluster"),
        ((2,), "clusters of 1 layers for a model of 2"),
        ((2, 9), "layer 1 is to have 9 clusters of 4 heads"),
    ],
)
def test_counts_that_no_model_has_are_refused(counts, words):
    with pytest.raises(ValueError, match=words):
        HeadClusters(counts).check(2, GroupedHeads(4, 2))


def test_an_unknown_membership_is_refused():
    with pytest.raises(ValueError, match="unknown membership 'nearest'; known: medoid, lowest"):
        HeadClusters((1,), "nearest")


def test_kernels_that_cannot_read_them_say_so():
    shapes = AttentionShapes("bfloat16", 1, 64, 64, clustered=True)
    with use_target(H200):
        assert CHUNK_ATTENTION.resolve(None, shapes) == "pallas_triton"
        with pytest.raises(ImplementationError, match="keys of clustered heads have their own"):
            CHUNK_ATTENTION.resolve("pallas_mosaic_gpu", shapes)


@pytest.mark.parametrize(("num_chunks", "refused"), [(2**22, False), (2**24, True)])
def test_maps_that_32_bits_would_not_find_are_refused(num_chunks, refused):
    """Of 1 GiB and of 4; nothing is allocated."""
    heads = GroupedHeads(128, 2)
    slots = KeySlots.of(HeadClusters((128, 128)), heads)
    pool = jax.ShapeDtypeStruct((slots.total, num_chunks, 16, DIM), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((2, 2, *pool.shape[1:]), jnp.bfloat16)
    maps = jax.ShapeDtypeStruct((2, num_chunks, 128), jnp.uint8)

    def dtype_of(keys, values, maps):
        stored = ClusteredKV(keys, values, maps, maps, jnp.int32(1), slots)
        shape = KernelShape.of("chunk_first", None, stored, AttentionSpec.of(128, 128, DIM))
        return jnp.zeros((), shape.dtype)

    if not refused:
        assert jax.eval_shape(dtype_of, pool, values, maps).dtype == jnp.bfloat16
        return
    with pytest.raises(ValueError, match=r"cannot address 'head_slots' .* 4294967296 bytes"):
        jax.eval_shape(dtype_of, pool, values, maps)
