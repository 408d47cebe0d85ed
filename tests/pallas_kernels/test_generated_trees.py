"""Attention over trees that hypothesis makes up, all of one shape, so compiled once."""

from __future__ import annotations

import chex
import jax
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_chunkattn.planning.options import PACKINGS
from jax_chunkattn.planning.planner import PlannerOptions, PlanShape, plan_decode
from jax_chunkattn.tree.prefix_tree import PrefixTree
from pallas_kernels import chunk_attention
from pallas_kernels.implementations import needs_partials
from tests import oracle
from tests.effort import examples
from tests.interpreted import optimised_implementations

CHUNK, CHUNKS, ROWS, HEADS, KV_HEADS, HEAD_DIM = 16, 160, 8, 6, 2, 16
RANDOM = np.random.default_rng(0)
KEYS, VALUES = RANDOM.standard_normal((2, 1, KV_HEADS, CHUNKS, CHUNK, HEAD_DIM), np.float32)
QUERIES = RANDOM.standard_normal((ROWS, HEADS, HEAD_DIM), np.float32)

prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=70), min_size=1, max_size=ROWS)
cpu_options = st.builds(
    PlannerOptions,
    item_overhead=st.sampled_from([0.0, 1.0 * CHUNK, 3.0 * CHUNK]),
    item_read=st.sampled_from([0.0, 1.0]),
    max_item_chunks=st.sampled_from([None, 2]),
)
gpu_options = st.builds(
    PlannerOptions.for_gpu,
    worth_sharing=st.sampled_from([None, lambda rows, chunks: rows > 1]),
    num_sms=st.sampled_from([1, 132]),
    num_heads=st.just(HEADS),
    num_kv_heads=st.just(KV_HEADS),
    head_dim=st.just(HEAD_DIM),
    chunk_size=st.just(CHUNK),
    packing=st.sampled_from(PACKINGS),
    query_tile=st.sampled_from([4, 64, 1000]),
    min_piece_tokens=st.sampled_from([16, 64]),
    max_private_chunks=st.sampled_from([0, 2]),
)

attend = jax.jit(
    chex.assert_max_traces(chunk_attention, n=4),  # once by each implementation
    static_argnames="implementation",
)


@optimised_implementations
@settings(
    max_examples=examples(50, 150),
    deadline=None,
    # The fixture chooses the device for all examples alike.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompts, st.lists(st.integers(0, 69), max_size=4), st.data())
def test_attention_over_any_tree_is_the_oracles(implementation, prompts, cuts, data):
    """`cuts` repeat beginnings of the first prompt, for prefixes as long as drawn prompts' rarely
    are. Every number stands for four tokens, a quarter of a chunk. 8e-7: twice the largest error of
    plain float32 attention over this pool (2.9e-7), and two units in the last place."""
    options = data.draw(gpu_options if needs_partials(implementation) else cpu_options)
    prompts = (prompts + [prompts[0][: cut + 1] for cut in cuts])[:ROWS]
    tree = PrefixTree(CHUNKS, CHUNK)
    for prompt in prompts:
        tree.insert([token for token in prompt for _ in range(4)])
    rows = tree.rows()
    tables = [row.chunk_ids for row in rows]
    lengths = np.zeros(ROWS, np.int32)
    lengths[: len(rows)] = [row.num_tokens for row in rows]
    plan, _ = plan_decode(
        tables,
        [row.num_tokens for row in rows],
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=options,
        at_least=PlanShape(
            rows=ROWS,
            items=256,
            item_chunks=256,
            private_chunks=32,
            slots=4096 if needs_partials(implementation) else 0,
        ),
    )
    got = attend(QUERIES, KEYS, VALUES, plan, lengths, implementation=implementation)
    exact = oracle.decode_attention(QUERIES, KEYS[0], VALUES[0], tables, lengths)
    chex.assert_trees_all_close(got, exact, rtol=1e-7, atol=8e-7)
