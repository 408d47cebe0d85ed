"""What the parts of the GPU experiment stand on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.gpu import clock, goals, jobs, oracle, peer_paged
from experiments.gpu.bench import Bench, device_for
from experiments.gpu.budget import SHARES, Budget
from experiments.gpu.jobs import MOSAIC, TRITON, unshared
from experiments.gpu.loops import LoopSize, loop_program, plan_case, planner_options
from experiments.gpu.peer_torch import FLASHINFER
from experiments.gpu.pools import Buffers, PoolShape
from experiments.gpu.tables import case_tables
from experiments.harness.errors import UserError
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels.specs import GPU_NUMERICS, PAT_HEADS, PAT_TREES, AttentionCase
from tests import oracle as dense


@pytest.mark.parametrize(
    "tree", ["1,3_64,8", "1,2,4_32,16,4", "2,4,8_20,30,40", "5_33", "1,4_48,0", "1,2,8_32,8,24"]
)
def test_tables_share_what_the_prefix_tree_shares(tree: str):
    case = AttentionCase(tree, 1, 1, 16, chunk_size=16)
    tables, inputs = case_tables(case), case_inputs(case)
    if "1,4_48,0" not in tree:  # there all rows are one prompt, whose tail the tree forks
        assert len({chunk for row in inputs.tables for chunk in row}) == tables.num_chunks
    names: dict[int, int] = {}
    for ours, theirs in zip(tables.tables.tolist(), inputs.tables, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert names.setdefault(a, b) == b
    assert tables.lengths == inputs.lengths[: tables.rows].tolist()


def test_tokens_of_shared_nodes_are_counted_once():
    tables = case_tables(AttentionCase("1,2,4_32,16,4", 1, 1, 16, chunk_size=16))
    assert tables.distinct_tokens == 32 + 2 * 16 + 4 * 4
    placed = tables.placed(50, seed=1)
    assert len(np.unique(placed)) == tables.num_chunks
    assert placed.max() < 50


def test_ragged_cases_have_no_tables():
    with pytest.raises(ValueError, match="ragged"):
        case_tables(AttentionCase("1_4", 1, 1, 16, ragged=3))


@pytest.mark.parametrize(
    ("dtype", "scores"),
    [("float32", {}), ("bfloat16", {}), ("bfloat16", {"scale": 1.0, "softcap": 3.0})],
)
def test_the_oracle_is_the_dense_one(dtype: str, scores: dict[str, Any]):
    inputs = case_inputs(AttentionCase("1,3_40,7", 6, 2, 16, chunk_size=16, dtype=dtype))
    found = oracle.expected(
        inputs.q,
        inputs.keys[0],
        inputs.values[0],
        inputs.tables,
        inputs.lengths.tolist(),
        most=100,
        **scores,
    )
    exact = dense.decode_attention(
        inputs.q, inputs.keys[0], inputs.values[0], inputs.tables, inputs.lengths, **scores
    )
    assert len(found.where) == 3 * 2
    assert found.error(exact) < 1e-12
    assert found.error(exact + 0.25) == pytest.approx(0.25)
    assert 0 < found.naive_error < (1e-6 if dtype == "float32" else 3e-2)
    exact[-1, 0, 0] = np.nan
    assert found.error(exact) == float("inf")


def test_time_that_a_part_leaves_is_for_the_next():
    now = [0.0]
    budget = Budget(100, ["floors", "paper"], clock=lambda: now[0])
    share = 100 * SHARES["floors"] / (SHARES["floors"] + SHARES["paper"])
    budget.enter("floors")
    assert budget.left == pytest.approx(share)
    assert budget.lacks(share + 1)
    now[0] = 1.0
    budget.enter("paper")
    assert budget.left == pytest.approx(99)
    assert budget.lacks(98) is None
    now[0] = 150.0
    assert "0 s are left" in (budget.lacks(1) or "")


def test_sides_are_timed_by_the_step_and_a_failing_one_is_left_out():
    errors: list[str] = []

    def fails(index: int):
        raise RuntimeError("no")

    sides = {
        "one": clock.Side(lambda _: jnp.ones(3, jnp.float32)),
        "broken": clock.Side(fails),
        "many": clock.Side(lambda _: jnp.ones(3, jnp.float32), steps=1000),
    }
    timings = clock.time_sides(
        sides, seconds=0.001, repeats=3, on_error=lambda name, _: errors.append(name)
    )
    assert errors == ["broken"]
    assert list(timings) == ["one", "many"]
    assert timings["many"].median < timings["one"].median / 50
    assert all(t.least <= t.median <= t.most and t.repeats == 3 for t in timings.values())


def test_pools_fill_the_buffers_exactly():
    shapes = set()
    for job in (*jobs.paper_jobs(), *jobs.tree_jobs(), *jobs.hydragen_jobs(), *jobs.tune_jobs()):
        shape = PoolShape.of(job.case, case_tables(job.case).num_chunks, small=False)
        assert shape.layers >= 2
        shapes.add(shape)
    assert len(shapes) < 15  # few pools are few programs
    with pytest.raises(ValueError, match="do not fit"):
        PoolShape.of(AttentionCase("1_1", 1, 1, 80), 1, small=False)


def test_every_tree_is_timed_with_every_head_configuration():
    timed = {(job.case.tree, job.case.num_heads, job.case.num_kv_heads) for job in jobs.tree_jobs()}
    assert timed == {(tree, *heads) for tree in PAT_TREES for heads in PAT_HEADS}


def test_the_gpu_cases_vary_what_the_kernels_are_compiled_for():
    assert {case.dtype for case in GPU_NUMERICS} == {"float32", "bfloat16", "float16"}
    assert {case.chunk_size for case in GPU_NUMERICS} == {16, 32, 64, 128, 256}
    assert {case.num_heads // case.num_kv_heads for case in GPU_NUMERICS} >= {1, 3, 8, 16}
    assert {case.head_dim for case in GPU_NUMERICS} >= {32, 64, 80, 128, 256}


@pytest.mark.parametrize(("pages", "expected"), [(64, (64, 16)), (65, (66, 11)), (1, (16, 8))])
def test_paged_attention_gets_whole_steps(pages: int, expected: tuple[int, int]):
    assert peer_paged.partition(pages, 64) == expected


def timed(case: AttentionCase | str, side: str, value: float, **more: Any) -> dict[str, Any]:
    name = case if isinstance(case, str) else case.name
    fields = {"batch": 32, "floor": "bandwidth", "fraction_of_floor": 0.9, **more}
    start = {"part": "paper", "case": name, "side": side, "status": "measured"}
    return {**start, "value": value, "unit": "us", **fields}


def outcomes(*records: dict[str, Any]) -> list[str]:
    return [goal["outcome"] for goal in goals.evaluate(records)]


def test_goals_are_unknown_without_measurements():
    assert outcomes() == [goals.UNKNOWN] * 7
    skipped = {"part": "paper", "case": "x", "side": MOSAIC, "status": "skipped", "message": ""}
    assert outcomes(skipped) == [goals.UNKNOWN] * 7


def test_goals_of_single_cases():
    large = AttentionCase("1,64_4096,64", 32, 8, 128, dtype="bfloat16")
    short = AttentionCase("1,64_1024,64", 32, 8, 128, dtype="bfloat16")
    fast = [
        timed(goals.HEADLINE, MOSAIC, 24.9),
        timed(goals.HEADLINE, unshared(MOSAIC).name, 24.0),
        timed(large, MOSAIC, 9.0, batch=64, floor="matrix", fraction_of_floor=0.61),
        timed(short, MOSAIC, 9.0, batch=64, fraction_of_floor=0.1),  # not long enough to count
    ]
    assert outcomes(*fast)[:2] == [goals.PASS] * 2
    assert outcomes(*fast)[-1] == goals.PASS
    slow = [
        timed(goals.HEADLINE, MOSAIC, 25.3),
        timed(goals.HEADLINE, unshared(MOSAIC).name, 24.0),
        timed(large, MOSAIC, 9.0, batch=64, fraction_of_floor=0.61),
    ]
    assert outcomes(*slow)[:2] == [goals.FAIL] * 2
    assert outcomes(*slow)[-1] == goals.FAIL


@pytest.mark.parametrize(("won", "outcome"), [(16, goals.PASS), (15, goals.FAIL)])
def test_trees_are_won_by_number(won: int, outcome: str):
    records = []
    for index, tree in enumerate(PAT_TREES):
        case = AttentionCase(tree, 32, 8, 128, dtype="bfloat16")
        records.append(timed(case, MOSAIC, 1.0 if index < won else 3.0))
        records.append(timed(case, FLASHINFER, 2.0))
    found = {goal["goal"].rpartition(", ")[2]: goal for goal in goals.evaluate(records)}
    assert found["32/8 heads"]["outcome"] == outcome
    assert found["64/8 heads"]["outcome"] == goals.UNKNOWN
    assert outcomes(*records[:-1])[4] == goals.UNKNOWN


def test_shared_tokens_of_a_name():
    assert goals.shared_tokens("1,64_4096,64 h32/8 d128 c64 bfloat16") == 4096
    assert goals.shared_tokens("1,1,8_100,20,3+9 h1/1 d16 c16 float32") == 120
    assert goals.shared_tokens("32_4096 h32/32 d128 c64 bfloat16") == 0


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [MOSAIC, TRITON])
def test_timed_programs_compile_for_an_h200(implementation: str):
    """The loop sees the large buffers as a pool without copying them."""
    try:
        with device_for("compile-only"):
            case = AttentionCase("1,32_1024,64", 32, 8, 128, dtype="bfloat16")
            options = planner_options(case, implementation)
            planned = plan_case(case, case_tables(case), options, small=False)
            program = loop_program(planned, implementation, Buffers(small=False), LoopSize(8, 4))
            bench: Any = Bench("compile-only", *[None] * 3)  # pyright: ignore[reportArgumentType]
            compiled = bench.get(program)
    except UserError as error:
        pytest.skip(str(error))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > 2 * 2 * (1 << 33)
    assert memory.temp_size_in_bytes < 500e6
    assert "known_trip_count" in compiled.as_text()
    assert jax.devices()[0].platform == "cpu"
