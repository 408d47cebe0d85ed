"""After a warm-up nothing compiles, whatever the work, and answers are what they were."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest

from experiments.harness.compilations import count_compilations
from jax_chunkattn import EngineClosed, PlannerOptions, PrefixTree, SamplingParams, plan_decode
from jax_chunkattn.engine.requests import Request
from jax_chunkattn.engine.rows import TOO_MANY_ITEMS, PlannedRows
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.planning.options import PACKINGS
from jax_chunkattn.planning.planner import PlanShape
from jax_chunkattn.planning.prefill import (
    CALL_TOKENS,
    PrefillShape,
    Segment,
    max_segments,
    pack_segments,
)
from tests.jax_chunkattn.engine.engines import SHARE_ALL, assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

CHUNK_SIZE = 16
COLUMNS = 40


def small_engine():
    return make_engine(num_chunks=40, max_running=2, prefill_tokens=32)


@pytest.mark.slow
def test_nothing_compiles_after_a_warm_up():
    """Long and short rows, shared and not, samples, forks, penalties, preemption and eviction."""
    engine = small_engine()
    warm = engine.warm_up(threads=2)
    assert engine.stats.compilations == warm.programs <= 2 + 1 + 4
    assert engine.stats.compile_seconds == pytest.approx(warm.seconds, rel=0.1, abs=0.1)
    assert engine.warm_up().programs == 0
    long, longer = token_tree((2, 260))
    branches = token_tree((1, 60), (3, 20), seed=1)
    penalised = SamplingParams(40, repetition_penalty=1.2, logit_bias={3: 1.0}, logprobs=2)
    with count_compilations() as counted:
        greedy = [
            engine.submit(long[:200], SamplingParams(250)),
            engine.submit(longer, SamplingParams(200)),
            *(engine.submit(prompt, SamplingParams(30)) for prompt in branches),
            engine.submit([1], SamplingParams(1)),
        ]
        engine.submit_samples(branches[0], SamplingParams(20, temperature=1.0, top_p=0.9, n=3))
        engine.submit(branches[1][:50], penalised, salt="other")
        while len(greedy[0].tokens) < 20:
            engine.step()
        greedy.append(greedy[0].fork(SamplingParams(60)))
        engine.submit(long, SamplingParams(250)).abort()
        engine.run()
    assert (counted.compiled, counted.from_cache) == (0, 0)
    assert engine.stats.compilations == warm.programs
    assert engine.stats.preemptions > 0 < engine.stats.evictions
    for handle in greedy:
        expected = greedy_without_cache(handle.prompt, handle.params.max_tokens)
        assert list(handle.tokens) == expected
    assert_all_returned(engine)


@pytest.mark.slow
def test_a_warm_up_may_come_while_requests_run():
    [prompt] = token_tree((1, 60), seed=1)
    engine = small_engine()
    handle = engine.submit(prompt, SamplingParams(30))
    while len(handle.tokens) < 2:
        engine.step()
    engine.warm_up()
    compilations = engine.stats.compilations
    assert run([handle]) == [greedy_without_cache(prompt, 30)]
    assert engine.stats.compilations == compilations
    assert_all_returned(engine)


def test_a_warm_up_that_cannot_be_is_refused():
    engine = small_engine()
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        engine.warm_up(threads=0)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.warm_up()


def random_tree(random: np.random.Generator, rows: int) -> tuple[list[list[int]], list[int]]:
    """Block tables in depth-first order, branching anywhere, and the tokens in their chunks."""
    tables, next_chunk = [], 0
    for _ in range(rows):
        shared = int(random.integers(len(tables[-1]) + 1)) if tables else 0
        own = int(random.integers(COLUMNS - shared + 1)) or (shared == 0)
        tables.append(
            [*(tables[-1] if tables else [])[:shared], *range(next_chunk, next_chunk + own)]
        )
        next_chunk += own
    lengths = [int(random.integers(CHUNK_SIZE * len(table) + 1)) for table in tables]
    return tables, lengths


CPU_OPTIONS = {
    "default": PlannerOptions(),
    "share all": SHARE_ALL,
    "unshared": PlannerOptions(sharing=False),
    "cut": PlannerOptions(
        max_item_chunks=3, max_item_rows=2, worth_sharing=SHARE_ALL.worth_sharing
    ),
}
GPU_OPTIONS = {
    f"gpu {packing}, {num_sms} processors": PlannerOptions.for_gpu(
        num_sms=num_sms,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        chunk_size=CHUNK_SIZE,
        dtype_bytes=4,
        packing=packing,
        sharing=False,
    )
    for packing in PACKINGS
    for num_sms in (1, 8, 132)
}


every_option = pytest.mark.parametrize(
    "options", [*CPU_OPTIONS.values(), *GPU_OPTIONS.values()], ids=[*CPU_OPTIONS, *GPU_OPTIONS]
)


@pytest.mark.slow
@every_option
def test_no_plan_outgrows_the_largest_shape(options):
    """On a GPU that is said of plans that share nothing."""
    random = np.random.default_rng(0)
    for rows in (1, 2, 3, 8, 30):
        largest = PlanShape.largest(rows, COLUMNS, options)
        for _ in range(20):
            tables, lengths = random_tree(random, rows)
            plan, _ = plan_decode(
                tables,
                lengths,
                chunk_size=CHUNK_SIZE,
                num_chunks=rows * COLUMNS,
                options=options,
                at_least=largest,
            )
            assert PlanShape.of(plan) == largest


def segments_of(tables, lengths, num_tokens: int) -> list[Segment]:
    """For each sequence the tokens behind those that are there: half of what room is left."""
    segments, room = [], num_tokens - len(tables)
    for table, begin in zip(tables, lengths, strict=True):
        missing = CHUNK_SIZE * len(table) - begin
        if missing:
            more = min(room // 2, missing - 1)
            room -= more
            segments.append(Segment([0] * (1 + more), table, begin, begin + 1 + more, begin))
    return segments


@every_option
@pytest.mark.parametrize("num_tokens", CALL_TOKENS)
def test_no_prefill_outgrows_the_largest_shape(num_tokens, options):
    """As for plans."""
    random = np.random.default_rng(0)
    largest = PrefillShape.largest(num_tokens, COLUMNS, options)
    for _ in range(20):
        tables = random_tree(random, int(random.integers(max_segments(num_tokens))) + 1)
        batch = pack_segments(
            segments_of(*tables, num_tokens) or [Segment([0], [0], 0, 1, 0)],
            num_tokens=num_tokens,
            chunk_size=CHUNK_SIZE,
            num_chunks=32 * COLUMNS,
            options=options,
            at_least=largest,
        )
        assert PrefillShape.of(batch) == largest


def in_tree(tree: PrefixTree, prompts: list[list[int]]) -> list[Request]:
    """Running requests, in the tree's order."""
    requests = [
        Request(tuple(prompt), b"", (0, index), SamplingParams())
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        request.sequence = tree.insert(request.prompt)
    order = tree.rows()
    return sorted(requests, key=lambda one: order.index(one.placed))


@pytest.mark.parametrize(
    "options",
    [
        PlannerOptions(),
        *(
            dataclasses.replace(GPU_OPTIONS[name], sharing=True)
            for name in ("gpu cost, 132 processors", "gpu pat, 8 processors")
        ),
    ],
    ids=["cpu", "gpu cost", "gpu pat"],
)
def test_decoding_needs_a_program_for_each_power_of_two_rows(options):
    """On a GPU after a while: when plans that are as large were made."""
    chex.clear_trace_counter()
    random = np.random.default_rng(0)
    batches = []
    for rows in random.permutation(np.repeat(np.arange(1, 17), 2)).tolist():
        prompts = token_tree((1, 100), (rows, 500), seed=rows)
        cuts = random.integers(1, 600, rows).tolist()
        tree = PrefixTree(rows * COLUMNS, CHUNK_SIZE)
        cut = [prompt[:end] for prompt, end in zip(prompts, cuts, strict=True)]
        batches.append((tree, in_tree(tree, cut)))
    planned = PlannedRows(options, EngineStats(), COLUMNS)
    if options.gpu is not None:
        for batch in batches:
            planned.plan(*batch)
    run = jax.jit(chex.assert_max_traces(lambda plan: plan, n=5))  # 1, 2, 4, 8 and 16 rows
    for batch in batches:
        run.eval_shape(planned.plan(*batch))


def test_what_shares_in_too_many_places_is_decoded_unshared(monkeypatch):
    """Only a GPU's shapes are too small for anything; here all are made so."""
    roomy = PlanShape.largest(4, COLUMNS, SHARE_ALL)
    tight = dataclasses.replace(roomy, items=2)
    reasons = []
    for shape in (roomy, tight):
        monkeypatch.setattr(PlanShape, "largest", lambda *_, shape=shape: shape)
        tree, stats = PrefixTree(40, CHUNK_SIZE), EngineStats()
        running = in_tree(tree, token_tree((1, 32), (2, 16), (2, 17)))
        plan = PlannedRows(SHARE_ALL, stats, COLUMNS).plan(tree, running)
        assert PlanShape.of(plan) == shape
        assert int(plan.items.count) == (3 if shape is roomy else 0)
        reasons.append(stats.plan_decision)
    assert reasons[0].startswith("shared: ")
    assert reasons[1] == f"unshared: {TOO_MANY_ITEMS}"
