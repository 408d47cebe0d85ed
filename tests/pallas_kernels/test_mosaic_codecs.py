"""The Mosaic GPU kernels over encoded chunks, in their interpreter, which also looks for races."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions, plan_decode
from jax_chunkattn.planning.workloads import AttentionInputs, case_inputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_shape import interpreter
from pallas_kernels.codecs import ChunkCodec
from pallas_kernels.coded_kv import CodedKV
from pallas_kernels.plans import DecodePlan, DecodeReads, OwnChunks
from pallas_kernels.specs import AttentionCase
from tests import oracle
from tests.pallas_kernels.test_chunk_attention import naive_attention
from tests.pallas_kernels.test_codecs import decoded, encoded, lossy
from tests.pallas_kernels.test_mosaic_gpu import (
    _races_of_matrix_operands,  # noqa: F401
    interpreted,
    reserve_slots,
    share,
)

mosaic = importlib.import_module("pallas_kernels.chunk_attention.pallas_mosaic_gpu")


class Problem(NamedTuple):
    """What rows read: encoded chunks, and of their own chunk exact tokens."""

    inputs: AttentionInputs
    plan: DecodePlan
    stored: CodedKV
    own: OwnChunks


def coded_problem(case: AttentionCase, codec: ChunkCodec, options: PlannerOptions) -> Problem:
    """A case's last layer with every chunk encoded, planned as the decode loop has it: without the
    token that the step writes."""
    inputs = case_inputs(case, layers=2)
    rows, size, num_chunks = len(inputs.tables), case.chunk_size, inputs.keys.shape[2]
    plan, _ = plan_decode(
        inputs.tables,
        (inputs.lengths[:rows] - 1).tolist(),
        chunk_size=size,
        num_chunks=num_chunks,
        options=options,
    )
    plan = reserve_slots(plan, case.num_heads // case.num_kv_heads)
    keys, values = (pool.astype(np.float32) for pool in (inputs.keys, inputs.values))
    stored = encoded(codec, keys, values, 1)
    slots = np.full(len(inputs.lengths), rows + 3, np.int32)  # nowhere, where a row is padding
    slots[:rows] = np.random.default_rng(0).permutation(rows + 3)[:rows]
    last = last_chunks(inputs, size)
    tails = []
    for pool in (inputs.keys, inputs.values):
        tail = np.full((2, case.num_kv_heads, rows + 3, *pool.shape[3:]), np.nan, pool.dtype)
        tail[1] = 1e3
        tail[:, :, slots[:rows]] = pool[:, :, last]
        tails.append(jnp.asarray(tail))
    return Problem(inputs, plan, stored, OwnChunks(tails[0], tails[1], slots))


def last_chunks(inputs: AttentionInputs, size: int) -> list[int]:
    """The chunk of each row's last token."""
    lengths = inputs.lengths[: len(inputs.tables)]
    return [
        table[(length - 1) // size] for table, length in zip(inputs.tables, lengths, strict=True)
    ]


def what_is_read(problem: Problem):
    """A pool of the last layer, and tables: decoded chunks, and each row's own behind them."""
    inputs, stored = problem.inputs, problem.stored
    keys, values = (pool[-1].astype(np.float32) for pool in (inputs.keys, inputs.values))
    last = last_chunks(inputs, stored.chunk_size)
    pools = [
        np.concatenate([codes, pool[:, last]], axis=1)
        for codes, pool in zip(decoded(stored.codec, keys, values), (keys, values), strict=True)
    ]
    before = [(length - 1) // stored.chunk_size for length in inputs.lengths]
    tables = [
        [*table[: before[row]], stored.num_chunks + row] for row, table in enumerate(inputs.tables)
    ]
    return pools, tables


def attend(problem: Problem, case: AttentionCase, query_tile: int = 64):
    """The attention by the interpreted kernels; raises where they race."""
    inputs = problem.inputs
    sizes = case.num_heads, case.num_kv_heads, case.head_dim
    attention = AttentionSpec.of(*sizes, scale=case.scale, softcap=case.softcap)
    params = interpreter(detect_races=True)

    @jax.jit
    def run(q, stored, reads):
        return mosaic.chunk_attention(
            q, stored, reads, attention, query_tile=query_tile, interpret=params
        )

    reads = DecodeReads(problem.plan, inputs.lengths, problem.own)
    got = np.asarray(run(inputs.q, problem.stored, reads))
    state = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    assert not state.get_races().races_found
    assert got.dtype == inputs.q.dtype
    return got


def assert_as_exact_as_naive(case, codec, options, query_tile=64):
    problem = coded_problem(case, codec, options)
    got = attend(problem, case, query_tile)
    inputs, rows = problem.inputs, len(problem.inputs.tables)
    pools, tables = what_is_read(problem)
    how = {"scale": case.scale, "softcap": case.softcap}
    (keys, values), where = pools, (tables, inputs.lengths)
    exact = oracle.decode_attention(inputs.q, keys, values, *where, **how)[:rows]
    keys, values = (pool.astype(case.dtype) for pool in pools)
    naive = naive_attention(inputs.q, keys, values, *where, **how)
    error = np.abs(got.astype(np.float64)[:rows] - exact).max()
    assert error <= 2 * np.abs(naive.astype(np.float64) - exact).max() + 2e-7
    np.testing.assert_array_equal(got[rows:], 0)


slow = pytest.mark.slow
NUMERICS = {
    "int8": (AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=32, dtype="float16", ragged=9), 64),
    "int4": (AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=32, dtype="bfloat16", ragged=9), 64),
}


@interpreted
@pytest.mark.parametrize("name", NUMERICS)
def test_error_is_at_most_twice_the_naive_one(name):
    case, query_tile = NUMERICS[name]
    assert_as_exact_as_naive(case, lossy(name), share(), query_tile)
