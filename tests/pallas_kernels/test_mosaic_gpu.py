"""The Mosaic GPU kernels in their interpreter, which also looks for races."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_shape import interpreter
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.plans import DecodeReads, PartialSlots
from pallas_kernels.specs import AttentionCase
from pallas_kernels.stored_kv import StoredKV
from tests import oracle
from tests.pallas_kernels.test_chunk_attention import naive_attention

mosaic = importlib.import_module("pallas_kernels.chunk_attention.pallas_mosaic_gpu")
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the interpreter of Mosaic GPU kernels is incomplete before jax 0.11",
)
WARPGROUP_ROWS = 64


def share(**cuts) -> PlannerOptions:
    return PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1, **cuts)


NUMERICS = {
    "nothing shared, G of 3": (
        AttentionCase("3_70", 3, 1, 64, chunk_size=32, dtype="bfloat16"),
        PlannerOptions(sharing=False),
        64,
    ),
    "one-token tails, more rows than a tile": (
        AttentionCase("1,9_128,1", 8, 1, 64, dtype="bfloat16"),
        share(),
        64,
    ),
    "two KV heads, two warpgroups of which one is empty": (
        AttentionCase("1,3_192,1", 6, 2, 128, dtype="float16"),
        share(),
        128,
    ),
    "G of 1, ten items of one chunk": (
        AttentionCase("1,4_640,7", 1, 1, 64, dtype="float16", ragged=60),
        share(max_item_chunks=1),
        64,
    ),
    "long items of small chunks, more rows than two warpgroups": (
        AttentionCase("1,2,6_64,400,5", 32, 1, 64, chunk_size=16, dtype="bfloat16", ragged=50),
        share(),
        128,
    ),
    "rows cut, chunks of several steps": (
        AttentionCase("1,5_512,150", 4, 1, 128, chunk_size=256, dtype="bfloat16"),
        share(max_item_rows=3),
        64,
    ),
    "largest heads": (AttentionCase("1,3_64,1", 2, 1, 256, dtype="bfloat16"), share(), 64),
    "scores of which a softcap bends most": (
        AttentionCase("1,3_64,20", 2, 1, 64, dtype="float16", softcap=5.0, scale=1.0),
        share(),
        64,
    ),
}


def reserve_slots(plan, group: int):
    """Partial slots of the plan, those of each item reserved for whole warpgroups."""
    items, count = plan.items, int(plan.items.count)
    rows = [np.arange(n) for n in items.row_count[:count]]
    reserved = [-(-(-(-len(r) * group // WARPGROUP_ROWS) * WARPGROUP_ROWS) // group) for r in rows]
    begin = np.zeros(len(items.row_begin) + 1, np.int32)
    none = np.zeros(0, np.int32)
    begin[1 : count + 1] = np.cumsum(reserved)
    row = np.concatenate([none, *(b + r for b, r in zip(items.row_begin, rows, strict=False))])
    slot = np.concatenate([none, *(b + r for b, r in zip(begin, rows, strict=False))])
    slots = np.zeros(max(sum(reserved), 1), np.int32)
    slots[: len(slot)] = slot[np.argsort(row, kind="stable")]
    row_begin = np.searchsorted(np.sort(row), np.arange(len(plan.covered_tokens) + 1))
    partials = PartialSlots(begin[:-1], row_begin.astype(np.int32), slots)
    return dataclasses.replace(plan, partials=partials)


def planned(case: AttentionCase, options: PlannerOptions):
    inputs = case_inputs(case, options=options, layers=2)
    return inputs, reserve_slots(inputs.plan, case.num_heads // case.num_kv_heads)


def attend(inputs, plan, lengths=None, query_tile: int = 64, scale=None, softcap=None):
    """The last layer's attention by the interpreted kernels; raises where they race."""
    params = interpreter(detect_races=True)

    @jax.jit
    def run(q, keys, values, plan, lengths, layer):
        sizes = q.shape[1], keys.shape[1], keys.shape[-1]
        attention = AttentionSpec.of(*sizes, scale=scale, softcap=softcap)
        operands = q, StoredKV(keys, values, layer), DecodeReads(plan, lengths), attention
        return mosaic.chunk_attention(*operands, query_tile=query_tile, interpret=params)

    lengths = inputs.lengths if lengths is None else lengths
    layer = np.int32(len(inputs.keys) - 1)
    got = np.asarray(run(inputs.q, inputs.keys, inputs.values, plan, lengths, layer))
    raise_if_it_raced()
    assert got.dtype == inputs.q.dtype
    return got


def raise_if_it_raced() -> None:
    """The interpreter of jax 0.11 only notes a race; where it does is not public."""
    state = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    assert not state.get_races().races_found


@pytest.fixture(autouse=True)
def _races_of_matrix_operands(monkeypatch):
    """The interpreter looks for races with every access but the matrix instruction's own: read its
    operands once more, and let that count as its kind of access (async proxy)."""
    multiply = plgpu.wgmma

    def wgmma(accumulator, a, b):
        for operand in (a, b):
            _ = operand[...]
        multiply(accumulator, a, b)
        plgpu.commit_smem()

    monkeypatch.setattr(plgpu, "wgmma", wgmma)


@interpreted
@pytest.mark.parametrize("name", NUMERICS)
def test_error_is_at_most_twice_the_naive_one(name):
    case, options, query_tile = NUMERICS[name]
    inputs, plan = planned(case, options)
    how = {"scale": case.scale, "softcap": case.softcap}
    got = attend(inputs, plan, query_tile=query_tile, **how)
    rows = len(inputs.tables)
    problem = inputs.q, inputs.keys[-1], inputs.values[-1], inputs.tables, inputs.lengths
    exact = oracle.decode_attention(*problem, **how)[:rows]
    naive = naive_attention(*problem, **how)
    error = np.abs(got.astype(np.float64)[:rows] - exact).max()
    assert error <= 2 * np.abs(naive.astype(np.float64) - exact).max() + 2e-7
    np.testing.assert_array_equal(got[rows:], 0)  # the plan's padding: rows with no tokens


@interpreted
def test_rows_without_tokens_give_zeros():
    inputs, plan = planned(AttentionCase("1,4_64,16", 2, 1, 64, dtype="bfloat16"), share())
    items = dataclasses.replace(plan.items, count=np.array(0, np.int32))
    assert plan.partials is not None
    none = dataclasses.replace(plan.partials, row_begin=np.zeros_like(plan.partials.row_begin))
    plan = dataclasses.replace(
        plan, items=items, partials=none, covered_tokens=np.zeros_like(plan.covered_tokens)
    )
    np.testing.assert_array_equal(attend(inputs, plan, np.zeros_like(inputs.lengths)), 0)


@interpreted
def test_padding_of_the_plan_is_never_read():
    """Chunks no row owns hold numbers that would show in any sum, and the plan's padding names
    rows, slots and chunks that are nowhere."""
    case = AttentionCase("1,3_70,20", 3, 1, 64, chunk_size=32, dtype="float16", ragged=9)
    inputs, plan = planned(case, share())
    expected = attend(inputs, plan)

    owned = {chunk for table in inputs.tables for chunk in table}
    foreign = [c for c in range(inputs.keys.shape[2]) if c not in owned]
    assert foreign
    inputs.keys[:, :, foreign] = 1e4
    inputs.values[:, :, foreign] = 1e4

    def spoil(array, used):
        return np.where(np.arange(array.shape[-1]) < used, array, np.int32(2**30))

    items, count, partials = plan.items, int(plan.items.count), plan.partials
    assert partials is not None
    assert count < len(items.row_begin)
    last = count - 1
    names = ("row_begin", "row_count", "chunk_begin", "chunk_count")
    wild = {name: spoil(getattr(items, name), count) for name in names}
    wild["chunks"] = spoil(items.chunks, items.chunk_begin[last] + items.chunk_count[last])
    private = -(-(inputs.lengths - plan.covered_tokens) // case.chunk_size)
    plan = dataclasses.replace(
        plan,
        items=dataclasses.replace(items, **wild),
        private_chunks=np.stack(list(map(spoil, plan.private_chunks, private))),
        partials=dataclasses.replace(partials, item_slot=spoil(partials.item_slot, count)),
    )
    np.testing.assert_array_equal(attend(inputs, plan), expected)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (("float32", 1, 64, 64), "take bfloat16 and float16, not"),
        (("bfloat16", 1, 80, 64), "head_dim of 64, 128 or 256, not 80"),
        (("bfloat16", 1, 64, 48), "chunk_size of 16, 32 or a multiple of 64, not 48"),
        (("bfloat16", 40, 64, 64), "up to 32 query heads a KV head, not 40"),
        (("float16", 3, 128, 16), None),
        (("bfloat16", 16, 256, 128), None),
    ],
)
def test_shapes_that_cannot_run_are_named(shapes, reason):
    got = mosaic.unsupported(AttentionShapes(*shapes))
    assert got is None if reason is None else reason in got
