"""Clustered heads: who is in a cluster, whose keys are kept, and attention by the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import plan_decode
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.clusters import ClusteredKV, HeadClusters, KeySlots, representatives_of
from pallas_kernels.clusters.membership import cluster, head_distances, medoids
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.implementations import ImplementationError
from pallas_kernels.plans import DecodeReads
from pallas_kernels.stored_kv import StoredKV
from tests.jax_chunkattn.planning.plan_helpers import SHARE_ALL
from tests.jax_chunkattn.rule import clusters as definition

CHUNK = 16
DIM = 8


def random_representatives(random, heads: int, count: int) -> np.ndarray:
    """Of `count` clusters by chance, none empty, some head of each."""
    label = np.append(np.arange(count), random.integers(0, count, heads - count))
    label = random.permutation(label)
    of = {one: random.choice(np.flatnonzero(label == one)) for one in range(count)}
    return np.array([of[one] for one in label.tolist()], np.int32)


@pytest.mark.parametrize("heads", [2, 5, 12])
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


def test_heads_are_as_far_apart_as_their_weights_do_not_correlate():
    random = np.random.default_rng(0)
    weights = definition.softmax(random.standard_normal((4, CHUNK, CHUNK)).astype(np.float32))
    weights[3] = weights[1]
    distance = np.asarray(head_distances(jnp.asarray(weights)))
    seen = np.tril(np.ones((CHUNK, CHUNK), bool))
    np.testing.assert_allclose(distance, 1 - np.corrcoef(weights[:, seen]), atol=1e-5)
    assert abs(distance[1, 3]) < 1e-6
    np.testing.assert_array_equal(distance, distance.T)
    one = np.asarray(head_distances(jnp.ones((3, 1, 1), jnp.float32)))  # a chunk of one token
    np.testing.assert_array_equal(one, 1 - np.eye(3))


@pytest.mark.parametrize("membership", ["medoid", "lowest", "random"])
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


def clustered_tree(group: int, count: int, seed: int):
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
    for of in range(2):
        root, middle = next(ids), next(ids)
        for chunks in ([root, middle], [root, middle, next(ids)], [root]):
            tables.append([*chunks, next(ids)])
            root_of |= dict.fromkeys(tables[-1], of)
    lengths = [len(table) * CHUNK - int(random.integers(0, CHUNK)) for table in tables]
    all_keys = random.standard_normal((kv_heads, num_chunks, CHUNK, DIM)).astype(np.float32)
    values = random.standard_normal((2, kv_heads, num_chunks, CHUNK, DIM)).astype(np.float32)
    keys = np.full((slots.total, num_chunks, CHUNK, DIM), np.nan, np.float32)
    representatives, head_slots = np.zeros((2, 2, num_chunks, heads.query_heads), np.uint8)
    for chunk, of in root_of.items():
        place = np.asarray(slots.of_heads(jnp.asarray(roots[of])))
        representatives[1, chunk], head_slots[1, chunk] = roots[of], place
        for head, slot in zip(roots[of].tolist(), place.tolist(), strict=True):
            keys[slots.begins[1] + slot, chunk] = all_keys[head // group, chunk]
    arrays = map(jnp.asarray, (keys, values, representatives, head_slots))
    stored = ClusteredKV(*arrays, jnp.int32(1), slots)
    read = [(roots[root_of[table[0]]], all_keys[:, table], values[1][:, table]) for table in tables]
    return stored, tables, lengths, read, random


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("group", "count"), [(1, 2), (1, 4), (2, 3), (4, 5), (8, 1)])
def test_attention_is_the_definitions(implementation, group, count):
    stored, tables, lengths, read, random = clustered_tree(group, count, seed=group + count)
    heads = stored.slots.heads.query_heads
    sizes = {"chunk_size": CHUNK, "num_chunks": stored.num_chunks}
    plan, summary = plan_decode(tables, lengths, options=SHARE_ALL, **sizes)
    assert summary.shared
    rows = plan.num_rows
    q = random.standard_normal((rows, heads, DIM)).astype(np.float32)
    by_row = np.stack([one for one, _, _ in read] + [np.arange(heads)] * (rows - len(read)))
    reads = DecodeReads(plan, jnp.asarray(lengths + [0] * (rows - len(read)), jnp.int32))
    found = CHUNK_ATTENTION.attend(
        jnp.asarray(np.take_along_axis(q, by_row[..., None], axis=1)),
        stored,
        reads,
        AttentionSpec.of(heads, heads, DIM),
        implementation=implementation,
    )
    for row, (of, keys, values) in enumerate(read):
        keys, values = (
            np.repeat(x.reshape(len(x), -1, DIM)[:, : lengths[row]], group, axis=0).astype(float)
            for x in (keys, values)
        )
        weights = definition.softmax(np.einsum("hd,hkd->hk", q[row, of], keys[of]) * DIM**-0.5)
        expected = np.einsum("hk,hkd->hd", weights, values)
        np.testing.assert_allclose(found[row], expected, atol=2e-6)


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
    stored, tables, lengths, _, _ = clustered_tree(1, 2, seed=4)
    plan, _ = plan_decode(tables, lengths, chunk_size=CHUNK, num_chunks=stored.num_chunks)
    q = jnp.zeros((plan.num_rows, 4, DIM))
    with pytest.raises(ImplementationError, match="cannot run"):
        CHUNK_ATTENTION.attend(
            q,
            stored,
            DecodeReads(plan, jnp.zeros(plan.num_rows, jnp.int32)),
            AttentionSpec.of(4, 4, DIM),
            implementation="pallas_triton",
        )
