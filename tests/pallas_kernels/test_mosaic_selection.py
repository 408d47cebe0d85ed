"""The Mosaic GPU kernels for rows that have chosen chunks, in their interpreter: it finds races."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.planning.planner import PlannerOptions, plan_decode
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_shape import interpreter
from pallas_kernels.plans import DecodeReads
from pallas_kernels.selection import ItemColumns, RowChoice, selected_rows
from pallas_kernels.stored_kv import StoredKV
from tests import oracle
from tests.pallas_kernels.test_mosaic_gpu import (
    _races_of_matrix_operands,  # noqa: F401
    interpreted,
    mosaic,
    raise_if_it_raced,
)

CHUNK, CHUNKS, HEADS, KV_HEADS, DIM = 64, 12, 6, 2, 64
TABLES = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 6]]
LENGTHS = [260, 300, 200]
COLUMNS = [[0, 2, 4], [2, 3, 4], [2, 3, 5]]  # the last row has two; nobody reads the second


@interpreted
def test_a_row_reads_what_it_has_chosen_of_an_item():
    random, dtype = np.random.default_rng(0), jnp.bfloat16
    keys, values = random.standard_normal((2, 2, KV_HEADS, CHUNKS, CHUNK, DIM)).astype(dtype)
    q = random.standard_normal((4, HEADS, DIM)).astype(dtype)
    plan, summary = plan_decode(
        TABLES,
        [length - 1 for length in LENGTHS],
        chunk_size=CHUNK,
        num_chunks=CHUNKS,
        options=PlannerOptions.for_gpu(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            chunk_size=CHUNK,
            worth_sharing=lambda rows, chunks: rows > 1,
        ),
        columns=5,
    )
    assert summary.shared
    assert plan.tables is not None
    tables = jnp.minimum(plan.tables, CHUNKS - 1)
    columns = np.full((4, 3), 5, np.int32)
    columns[:3] = COLUMNS
    choice = RowChoice(
        jnp.asarray(columns),
        jnp.array([3, 3, 2, 0], jnp.int32),
        jnp.array([4, 4, 3, 0], jnp.int32),
    )
    params = interpreter(detect_races=True)

    @jax.jit
    def run(q, stored, plan):
        items = jax.tree.map(jnp.asarray, plan.items)
        selected = selected_rows(
            plan,
            choice,
            tables,
            ItemColumns.of(items, tables),
            jnp.array(True),
            group=HEADS // KV_HEADS,
            chunk_size=CHUNK,
            num_chunks=CHUNKS,
        )
        attention = AttentionSpec.of(HEADS, KV_HEADS, DIM)
        reads = DecodeReads(selected, jnp.array([*LENGTHS, 0], jnp.int32))
        output = mosaic.chunk_attention(q, stored, reads, attention, interpret=params)
        return output, selected.items

    got, items = run(q, StoredKV(jnp.asarray(keys), jnp.asarray(values), 1), plan)
    raise_if_it_raced()
    assert 0 < int(items.chunk_count.sum()) < int(plan.items.chunk_count.sum())
    for row, (table, length, read) in enumerate(zip(TABLES, LENGTHS, COLUMNS, strict=True)):
        read = [column for column in read if column < len(table)]
        tokens = (np.array(read)[:, None] * CHUNK + np.arange(CHUNK)).ravel()
        ids = [table[column] for column in read]
        k, v = (
            np.asarray(pool[1], np.float64)[:, ids].reshape(KV_HEADS, -1, DIM)[:, tokens < length]
            for pool in (keys, values)
        )
        expected = oracle.attend(np.asarray(q[row], np.float64), k, v)
        # Outputs and weights are rounded to bfloat16, each by 2^-9 at most.
        np.testing.assert_allclose(
            np.asarray(got[row], np.float64), expected, rtol=2**-8, atol=2e-3
        )
    np.testing.assert_array_equal(got[3:], 0)
