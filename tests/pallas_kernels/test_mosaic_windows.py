"""The Mosaic GPU kernels for heads with windows, in their interpreter, which finds races."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions, plan_decode
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_shape import interpreter
from pallas_kernels.plans import DecodeReads, OwnChunks
from pallas_kernels.stored_kv import StoredKV
from pallas_kernels.windows import Window
from tests import oracle
from tests.pallas_kernels.test_codecs import decoded, encoded, lossy, mixed_context
from tests.pallas_kernels.test_mosaic_gpu import (
    _races_of_matrix_operands,  # noqa: F401
    interpreted,
    mosaic,
    raise_if_it_raced,
)
from tests.pallas_kernels.test_windows import expected_output

CHUNK, CHUNKS, HEADS, KV_HEADS, DIM = 32, 20, 6, 2, 64
WINDOWS = (Window(70, sinks=40), None)
OF_HEADS = np.array([0, 1], np.int32)
TABLES = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7], [0, 1, 2, 8]]
LENGTHS = [165, 180, 100]


def problem(dtype):
    random = np.random.default_rng(0)
    keys, values = random.standard_normal((2, 2, KV_HEADS, CHUNKS, CHUNK, DIM)).astype(dtype)
    return random.standard_normal((4, HEADS, DIM)).astype(dtype), keys, values


@interpreted
@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_row_reads_what_each_head_sees(codec):
    dtype = jnp.bfloat16
    q, keys, values = problem(dtype)
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
        windows=WINDOWS,
    )
    assert all(one.shared for one in summary.by_window)
    lengths = np.array([*LENGTHS, 0], np.int32)
    wide = [pool.astype(np.float32) for pool in (keys, values)]
    exact = [pool[1] for pool in wide]
    if codec is None:
        stored, own = StoredKV(jnp.asarray(keys), jnp.asarray(values), 1), None
        contexts = [
            tuple(oracle.context(pool, table, length) for pool in exact)
            for table, length in zip(TABLES, LENGTHS, strict=True)
        ]
    else:
        stored = encoded(lossy(codec), wide[0], wide[1], 1)
        last = [table[(length - 1) // CHUNK] for table, length in zip(TABLES, LENGTHS, strict=True)]
        tails = [jnp.asarray(pool[:, :, last]) for pool in (keys, values)]
        own = OwnChunks(tails[0], tails[1], np.array([0, 1, 2, 3], np.int32))
        contexts = [
            mixed_context(exact, decoded(lossy(codec), *exact), table, length)
            for table, length in zip(TABLES, LENGTHS, strict=True)
        ]
    params = interpreter(detect_races=True)

    @jax.jit
    def run(q, stored, reads):
        attention = AttentionSpec.of(HEADS, KV_HEADS, DIM)
        return mosaic.chunk_attention(q, stored, reads, attention, interpret=params)

    got = np.asarray(run(q, stored, DecodeReads(plan, lengths, own, jnp.asarray(OF_HEADS))))
    raise_if_it_raced()
    positions = [length - 1 for length in LENGTHS]
    expected = expected_output(q.astype(np.float32), contexts, positions, WINDOWS, OF_HEADS)
    # Outputs and weights are rounded to bfloat16, each by 2^-9 at most.
    np.testing.assert_allclose(got[:3].astype(np.float64), expected, rtol=2**-8, atol=2e-3)
    np.testing.assert_array_equal(got[3:], 0)
