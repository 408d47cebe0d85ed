from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels import chunk_attention, write_kv
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.implementations import needs_partials
from pallas_kernels.plans import DecodeReads
from pallas_kernels.specs import NUMERICS, AttentionCase
from pallas_kernels.stored_kv import StoredKV
from tests import oracle
from tests.effort import optimised
from tests.interpreted import implementations, optimised_implementations

# Small groups of heads and chunks and large ones, rows of many lengths, a softcap.
EVERYDAY = {"1,5_513,1", "1,6_96,20"}
# Their shapes are between those of others.
THOROUGH = {"1_1", "4_40", "1,4,16_96,64,48", "2,6_160,96"}


def marks_of(case: AttentionCase) -> list[pytest.MarkDecorator]:
    if case.tree in EVERYDAY:
        return []
    thorough = [pytest.mark.thorough] if case.tree in THOROUGH else []
    return [pytest.mark.slow_to_compile, *thorough]


cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=marks_of(case)) for case in NUMERICS]
)
PLANS = ["auto", "share all", "share nothing", "cut", "whole"]


def planner_options(plan: str, case: AttentionCase, implementation: str) -> PlannerOptions:
    """One way to cut the work of a case, for an implementation."""
    on_cpu = {
        "auto": {},
        "share all": {"worth_sharing": lambda rows, chunks: rows > 1},
        "share nothing": {"sharing": False},
        "cut": {"item_overhead": 0, "item_read": 0, "max_item_chunks": 3, "max_item_rows": 3},
        "whole": {"worth_sharing": lambda rows, chunks: chunks > 1},
    }
    if not needs_partials(implementation):
        return PlannerOptions(**on_cpu[plan])
    on_gpu = {
        "auto": {},
        "share all": {"worth_sharing": lambda rows, chunks: rows > 1},
        "share nothing": {"sharing": False},
        "cut": {
            "worth_sharing": lambda rows, chunks: rows > 1,
            "num_sms": 1000,
            "min_piece_tokens": 1,
            "query_tile": 4,
            "align": 1,
        },
        "whole": {
            "worth_sharing": lambda rows, chunks: rows > 1,
            "num_sms": 1,
            "query_tile": 10_000,
            "max_private_chunks": 1000,
        },
    }
    return PlannerOptions.for_gpu(
        **{
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "chunk_size": case.chunk_size,
            **on_gpu[plan],
        }
    )


@functools.partial(jax.jit, static_argnames=("scale", "softcap"))
def plain_attention(q, k, v, lengths, scale, softcap):
    """q [B, Hq, D], k and v [B, Hkv, T, D]: softmax(q k^T) v in q's own dtype, nothing else."""
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scale = jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    scores = jnp.einsum("bhd,bhtd->bht", q, k, precision="highest") * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    visible = jnp.arange(k.shape[2])[None, None] < lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("bht,bhtd->bhd", weights, v, precision="highest")


def naive_attention(q, keys, values, tables, lengths, scale=None, softcap=None):
    """Plain attention over every row's own dense copy of its keys and values."""
    rows = len(tables)
    width = max(map(len, tables))
    padded = np.array([table + [0] * (width - len(table)) for table in tables])

    def dense(pool):
        return np.moveaxis(pool[:, padded], 0, 1).reshape(rows, len(pool), -1, pool.shape[-1])

    args = q[:rows], dense(keys), dense(values), lengths[:rows]
    with optimised():
        return np.asarray(plain_attention(*args, scale, softcap))


def planned_inputs(case, implementation, plan="share all", **options):
    return case_inputs(case, options=planner_options(plan, case, implementation), **options)


def assert_as_exact_as_naive(case, implementation, plan="share all", layers=2):
    """flash-attention's rule: at most twice the naive error, both against float64."""
    inputs = planned_inputs(case, implementation, plan, layers=layers)
    rows = len(inputs.tables)
    args = (inputs.q, inputs.keys, inputs.values, inputs.plan, inputs.lengths)
    how = {"scale": case.scale, "softcap": case.softcap}
    got = chunk_attention(*args, layer=layers - 1, implementation=implementation, **how)
    assert got.dtype == inputs.q.dtype
    problem = inputs.q, inputs.keys[-1], inputs.values[-1], inputs.tables, inputs.lengths
    exact = oracle.decode_attention(*problem, **how)[:rows]
    naive = naive_attention(*problem, **how)
    error = np.abs(np.asarray(got, np.float64)[:rows] - exact)
    allowed = np.abs(naive.astype(np.float64) - exact)
    # 2e-7 is two units in the last place of a float32 output of order 1, for rows where the naive
    # version happens to be exact.
    assert error.max() <= 2 * allowed.max() + 2e-7
    np.testing.assert_array_equal(np.asarray(got)[rows:], 0)
    return inputs


@optimised_implementations
@cases
def test_error_is_at_most_twice_the_naive_one(case, implementation):
    assert_as_exact_as_naive(case, implementation)


@implementations
@pytest.mark.parametrize("plan", PLANS)
def test_every_way_to_cut_the_work_gives_the_same_attention(plan, implementation):
    case = AttentionCase("1,3,12_80,48,16", 6, 3, 32, chunk_size=16, ragged=100)
    inputs = assert_as_exact_as_naive(case, implementation, plan)
    if plan != "auto":
        assert inputs.summary.shared == (plan != "share nothing")


@optimised_implementations
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=[pytest.mark.slow, pytest.mark.thorough])]
)
@pytest.mark.parametrize(
    "case",
    [
        NUMERICS[4],
        pytest.param(NUMERICS[7], marks=marks_of(NUMERICS[7])),
        pytest.param(NUMERICS[-1], marks=pytest.mark.slow_to_compile),
    ],
    ids=lambda case: case.name,
)
def test_half_precision_accumulates_in_float32(case, dtype, implementation):
    case = dataclasses.replace(case, dtype=dtype)
    assert_as_exact_as_naive(case, implementation)


@implementations
def test_rows_without_tokens_give_zeros(implementation):
    case = AttentionCase("1,4_128,16", 4, 2, 16, chunk_size=16)
    inputs = planned_inputs(case, implementation)
    args = (inputs.q, inputs.keys, inputs.values, inputs.plan, np.zeros_like(inputs.lengths))
    items = dataclasses.replace(inputs.plan.items, count=np.array(0, np.int32))
    plan = dataclasses.replace(inputs.plan, items=items)
    if plan.partials is not None:
        begin = np.zeros_like(plan.partials.row_begin)
        plan = dataclasses.replace(
            plan, partials=dataclasses.replace(plan.partials, row_begin=begin)
        )
    empty = chunk_attention(*args[:3], plan, args[4], implementation=implementation)
    np.testing.assert_array_equal(empty, 0)


@implementations
def test_a_row_of_length_0_attends_to_what_items_cover_and_leaves_others_alone(implementation):
    case = AttentionCase("1,6_100,20", 4, 2, 16, chunk_size=16, ragged=30)
    inputs = planned_inputs(case, implementation)
    assert inputs.plan.covered_tokens[2] == 96
    args = (inputs.q, inputs.keys, inputs.values, inputs.plan)
    got, covered, expected = (
        np.asarray(chunk_attention(*args, lengths, implementation=implementation))
        for lengths in (
            np.where(np.arange(8) == 2, 0, inputs.lengths),
            np.where(np.arange(8) == 2, 96, inputs.lengths),
            inputs.lengths,
        )
    )
    np.testing.assert_array_equal(got, covered)
    np.testing.assert_array_equal(np.delete(got, 2, axis=0), np.delete(expected, 2, axis=0))


@implementations
def test_padding_of_the_plan_is_never_read(implementation):
    """Chunks no row owns hold numbers that would show in any sum."""
    case = AttentionCase("1,6_100,20", 4, 2, 16, chunk_size=16, ragged=30)
    inputs = planned_inputs(case, implementation)
    owned = {chunk for table in inputs.tables for chunk in table}
    foreign = [c for c in range(inputs.keys.shape[2]) if c not in owned]
    assert foreign
    keys, values = inputs.keys.copy(), inputs.values.copy()
    expected = chunk_attention(
        inputs.q, keys, values, inputs.plan, inputs.lengths, implementation=implementation
    )
    keys[:, :, foreign] = 1e4
    values[:, :, foreign] = 1e4
    got = chunk_attention(
        inputs.q, keys, values, inputs.plan, inputs.lengths, implementation=implementation
    )
    np.testing.assert_array_equal(got, expected)


def write_overflowed(keys, values, chunks, offsets):
    """The pool after tokens whose keys and values are no numbers were written to slots of it."""
    broken = np.resize(np.array([np.inf, -np.inf, np.nan], np.float32), (len(chunks), 1, 1))
    broken = np.broadcast_to(broken, (len(chunks), keys.shape[1], keys.shape[-1]))
    where = np.array(chunks, np.int32), np.array(offsets, np.int32)
    new = jnp.asarray(broken)
    return write_kv(jnp.asarray(keys), jnp.asarray(values), new, new, *where, layer=0)


@implementations
def test_what_overflowed_reaches_no_row_that_does_not_see_it(implementation):
    """In chunks of nobody, and in slots behind the last token of a row."""
    case = AttentionCase("1,6_100,20", 4, 2, 16, chunk_size=16, ragged=30)
    inputs = planned_inputs(case, implementation)
    how = {"plan": inputs.plan, "lengths": inputs.lengths, "implementation": implementation}
    expected = chunk_attention(inputs.q, inputs.keys, inputs.values, **how)
    tails = zip(inputs.tables, inputs.lengths, strict=False)
    behind = [table[length // 16] for table, length in tails if length % 16]
    owned = {chunk for table in inputs.tables for chunk in table}
    foreign = [chunk for chunk in range(inputs.keys.shape[2]) if chunk not in owned]
    chunks = [*behind, *foreign, *foreign, *foreign]
    offsets = [15] * len(behind) + [slot for slot in range(3) for _ in foreign]
    keys, values = write_overflowed(inputs.keys, inputs.values, chunks, offsets)
    got = chunk_attention(inputs.q, keys, values, **how)
    np.testing.assert_array_equal(got, expected)


@implementations
def test_a_query_that_is_no_number_shows(implementation):
    case = AttentionCase("1,6_100,20", 4, 2, 16, chunk_size=16, ragged=30)
    inputs = planned_inputs(case, implementation)
    q = inputs.q.copy()
    q[2, 1, 3] = np.nan
    args = (q, inputs.keys, inputs.values, inputs.plan, inputs.lengths)
    got = np.asarray(chunk_attention(*args, implementation=implementation))
    assert np.isnan(got[2, 1]).all()
    chex.assert_tree_all_finite(np.delete(got, 2, axis=0))


@optimised_implementations
def test_scores_may_all_be_far_below_zero(implementation):
    """The softmax is of differences: padding must not stand in for a score of 0."""
    case = AttentionCase("1,3_80,20", 6, 2, 16, chunk_size=16)
    inputs = planned_inputs(case, implementation)
    q = np.full_like(inputs.q, 5)
    keys = inputs.keys - np.float32(20)
    args = (q, keys, inputs.values, inputs.plan, inputs.lengths)
    got = chunk_attention(*args, implementation=implementation)
    exact = oracle.decode_attention(q, keys[-1], inputs.values[-1], inputs.tables, inputs.lengths)
    # Scores are about -400.
    chex.assert_trees_all_close(got[:3], exact[:3], rtol=0, atol=2e-4)


def test_reference_computes_in_float64_when_asked():
    case = AttentionCase("1,4_96,16", 4, 2, 16, chunk_size=16, ragged=9)
    inputs = case_inputs(case)
    with jax.enable_x64(True):
        q, keys, values = (x.astype(np.float64) for x in (inputs.q, inputs.keys, inputs.values))
        got = chunk_attention(
            q, keys, values, inputs.plan, inputs.lengths, implementation="reference"
        )
        assert got.dtype == np.float64
        exact = oracle.decode_attention(q, keys[0], values[0], inputs.tables, inputs.lengths)
        chex.assert_trees_all_close(got, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_numbers_have_their_types_with_jax_enable_x64(implementation):
    inputs = case_inputs(AttentionCase("1,4_96,16", 4, 2, 16, chunk_size=16))
    args = (inputs.q, inputs.keys, inputs.values, inputs.plan, inputs.lengths)
    with jax.enable_x64(True):
        got = jax.eval_shape(lambda: chunk_attention(*args, implementation=implementation))
    assert got.dtype == np.float32


def test_layer_may_be_traced():
    inputs = case_inputs(AttentionCase("1,4_96,16", 4, 2, 16, chunk_size=16), layers=3)
    args = (inputs.q, inputs.keys, inputs.values, inputs.plan, inputs.lengths)
    by_trace = jax.jit(lambda layer: chunk_attention(*args, layer=layer))(jnp.int32(2))
    np.testing.assert_array_equal(by_trace, chunk_attention(*args, layer=2))
    assert not np.array_equal(by_trace, chunk_attention(*args, layer=0))


@pytest.mark.optimised
def test_a_shared_chunk_is_multiplied_once_for_all_its_rows():
    """Floating-point operations as XLA counts them: the matrix products of the chunk-first phase
    have the queries of all rows as one operand, and no buffer holds the prefix once per row."""
    case = AttentionCase("1,32_2048,16", 4, 4, 64)
    inputs = case_inputs(case)
    args = (inputs.q, inputs.keys, inputs.values, inputs.plan, inputs.lengths)
    compiled = jax.jit(chunk_attention).lower(*args).compile()
    per_row = 32 * 2048 * 64 * 4  # bytes of one head's prefix, if every row had its own
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < per_row
    assert inputs.summary.chunk_reads == 2048 // 64


def test_wrong_arguments_are_named():
    inputs = case_inputs(AttentionCase("1,4_96,16", 4, 2, 16, chunk_size=16))
    rest = (inputs.plan, inputs.lengths)
    pools = (inputs.keys, inputs.values)
    known = "batch_invariant, native, pallas_mosaic_gpu, pallas_triton, reference, xla"
    with pytest.raises(ValueError, match=f"unknown implementation 'triton'; known: {known}"):
        chunk_attention(inputs.q, *pools, *rest, implementation="triton")
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV heads"):
        chunk_attention(inputs.q[:, :3], *pools, *rest)
    for softcap in (0.0, float("inf")):
        with pytest.raises(ValueError, match=rf"softcap must be positive .*, not {softcap}"):
            chunk_attention(inputs.q, *pools, *rest, softcap=softcap)
    stored = StoredKV(jnp.asarray(inputs.keys), jnp.asarray(inputs.values), 0)
    whole = DecodeReads(inputs.plan, inputs.lengths)
    few = DecodeReads(inputs.plan, inputs.lengths[1:])
    for queries, reads in ((inputs.q[1:], whole), (inputs.q[1:], few), (inputs.q, few)):
        with pytest.raises(ValueError, match="lengths, and the plan is of"):
            CHUNK_ATTENTION.attend(queries, stored, reads, AttentionSpec.of(4, 2, 16))
