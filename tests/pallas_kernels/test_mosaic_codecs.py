"""The Mosaic GPU kernels over encoded chunks, in their interpreter, which also looks for races."""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions, plan_decode
from jax_chunkattn.planning.workloads import AttentionInputs, case_inputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_shape import interpreter
from pallas_kernels.codecs import AffineCodec, ChunkCodec, ScaledFloatCodec
from pallas_kernels.coded_kv import CodedKV
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.plans import DecodePlan, DecodeReads, OwnChunks
from pallas_kernels.specs import AttentionCase
from tests import oracle
from tests.pallas_kernels.test_chunk_attention import naive_attention
from tests.pallas_kernels.test_codecs import decoded, encoded, lossy
from tests.pallas_kernels.test_mosaic_gpu import (
    _races_of_matrix_operands,  # noqa: F401
    interpreted,
    raise_if_it_raced,
    reserve_slots,
    share,
)

mosaic = importlib.import_module("pallas_kernels.chunk_attention.pallas_mosaic_gpu")


class Problem(NamedTuple):
    """What rows read: encoded chunks, and of their own chunk exact tokens."""

    inputs: AttentionInputs
    plan: DecodePlan
    stored: CodedKV
    own: OwnChunks | None


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
    raise_if_it_raced()
    assert got.dtype == inputs.q.dtype
    return got


class Coded(NamedTuple):
    """A case, and how its chunks are encoded and its work planned."""

    case: AttentionCase
    codec: ChunkCodec
    options: PlannerOptions = share()
    query_tile: int = 64


def assert_as_exact_as_naive(coded: Coded) -> None:
    """flash-attention's rule, against float64 over what is decoded."""
    case, problem = coded.case, coded_problem(coded.case, coded.codec, coded.options)
    got = attend(problem, case, coded.query_tile)
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


NUMERICS = {
    "int8, two chunks a step": Coded(
        AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=32, dtype="float16", ragged=9),
        lossy("int8"),
    ),
    "int4, chunks as long as a step": Coded(
        AttentionCase("1,3_128,20", 2, 1, 64, dtype="bfloat16", ragged=9), lossy("int4")
    ),
    "fp8, two chunks a step": Coded(
        AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=32, dtype="bfloat16", ragged=9),
        lossy("fp8"),
    ),
}
SLOW = {
    "fp8_e5m2, chunks of several steps, two KV heads": Coded(
        AttentionCase("1,2_512,70", 4, 2, 128, chunk_size=256, dtype="float16"),
        lossy("fp8_e5m2"),
    ),
    "int4, nothing shared, two KV heads": Coded(
        AttentionCase("3_200", 4, 2, 128, dtype="bfloat16", ragged=150),
        lossy("int4"),
        PlannerOptions(sharing=False),
    ),
    "int4, small chunks": Coded(
        AttentionCase("1,2,6_64,100,5", 8, 1, 64, chunk_size=16, dtype="float16", ragged=40),
        lossy("int4"),
    ),
    "int4, small chunks of large heads, a softcap": Coded(
        AttentionCase("1,3_64,20", 2, 1, 128, chunk_size=16, dtype="bfloat16", softcap=5.0),
        lossy("int4"),
    ),
    "int4, chunks of several steps": Coded(
        AttentionCase("1,3_512,150", 4, 1, 128, chunk_size=256, dtype="float16", ragged=60),
        lossy("int4"),
        share(max_item_rows=2),
    ),
    "int4, chunks of two long steps": Coded(
        AttentionCase("1,2_512,70", 1, 1, 64, chunk_size=256, dtype="bfloat16"), lossy("int4")
    ),
    "int8 keys and int4 values agree on a step's tokens": Coded(
        AttentionCase("1,2_256,70", 2, 1, 128, chunk_size=128, dtype="float16"),
        lossy("int8/int4"),
    ),
    "int8, chunks of several steps and groups": Coded(
        AttentionCase("1,2_512,70", 2, 1, 64, chunk_size=256, dtype="float16"), lossy("int8")
    ),
    "keys grouped along channels, values along tokens": Coded(
        AttentionCase("1,3_140,20", 2, 1, 128, chunk_size=32, dtype="float16", ragged=9),
        ChunkCodec("odd", AffineCodec(8, "channels"), AffineCodec(4, "tokens", fine_first=True)),
    ),
}

TWO_WARPGROUPS = {
    "columns": Coded(
        AttentionCase("1,3_128,5", 4, 1, 128, dtype="bfloat16"), lossy("int4"), query_tile=128
    ),
    "rows": Coded(
        AttentionCase("1,3_128,5", 4, 1, 64, chunk_size=32, dtype="float16"),
        lossy("int4"),
        query_tile=128,
    ),
}


@interpreted
@pytest.mark.parametrize(
    "name", [*NUMERICS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_error_is_at_most_twice_the_naive_one(name):
    assert_as_exact_as_naive((NUMERICS | SLOW)[name])


@interpreted
@pytest.mark.slow
@pytest.mark.skipif(
    int(os.environ.get("NPROC", os.cpu_count() or 1)) < 4,
    reason="warpgroups that wait for each other take a thread of XLA's each: set NPROC=8",
)
@pytest.mark.parametrize("name", TWO_WARPGROUPS)
def test_two_warpgroups_decode_one_part_each(name):
    assert_as_exact_as_naive(TWO_WARPGROUPS[name])


@interpreted
@pytest.mark.slow
def test_chunks_that_no_row_reads_do_not_show():
    """Nor what the copies of scales bring along from the next chunk."""
    case = AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=16, dtype="float16", ragged=9)
    problem = coded_problem(case, lossy("int4"), share())
    expected = attend(problem, case)
    owned = {chunk for table in problem.inputs.tables for chunk in table}
    foreign = [c for c in range(problem.stored.num_chunks) if c not in owned]
    assert foreign

    def spoil(array):
        worst = jnp.inf if array.dtype == jnp.float16 else 255
        return array.at[:, :, np.array(foreign)].set(jnp.asarray(worst, array.dtype))

    stored = problem.stored
    keys, values = (jax.tree.map(spoil, encoded) for encoded in (stored.keys, stored.values))
    stored = dataclasses.replace(stored, keys=keys, values=values)
    np.testing.assert_array_equal(attend(problem._replace(stored=stored), case), expected)


@dataclasses.dataclass(frozen=True)
class OnesCodec(ScaledFloatCodec):
    """A user's own."""


def two_parts(part) -> ChunkCodec:
    return ChunkCodec("mine", part, part)


@pytest.mark.parametrize(
    ("codec", "head_dim", "reason"),
    [
        (lossy("int8"), 64, None),
        (lossy("int4"), 128, None),
        (lossy("int8/int4"), 128, None),
        (lossy("fp8"), 128, None),
        (lossy("int2"), 64, "do not read keys stored as int2: they take 8 or 4 bits, not 2"),
        (lossy("int4/int2"), 64, "do not read values stored as int4/int2: they take 8 or 4 bits"),
        (lossy("int4", group=32), 64, "they take groups of 64 tokens, not of 32"),
        (two_parts(AffineCodec(8, "tokens", fine_first=True)), 64, "of codes of 4 bits only"),
        (two_parts(OnesCodec("float8_e4m3fn")), 64, "stored as mine: they know no OnesCodec"),
        (lossy("int4"), 256, "encoded chunks of a head_dim of 64 or 128, not 256"),
    ],
)
def test_codecs_that_cannot_be_read_are_named(codec, head_dim, reason):
    got = mosaic.unsupported(AttentionShapes("bfloat16", 4, head_dim, 64, codec))
    assert got is None if reason is None else reason in got


def test_exact_tokens_decide_on_the_dtype():
    shapes = AttentionShapes("float32", 4, 64, 64, lossy("int4"))
    assert "take bfloat16 and float16, not float32" in mosaic.unsupported(shapes)


@interpreted
def test_the_rows_own_chunks_are_asked_for():
    case = AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=32, dtype="float16")
    problem = coded_problem(case, lossy("int4"), share())
    with pytest.raises(ValueError, match="of its own"):
        attend(problem._replace(own=None), case)
