"""Engines whose queries choose what they read."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, CacheSpec, SamplingParams, plan_decode
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.pool import empty_pool
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState
from jax_chunkattn.device.selective_pool import SelectivePool
from jax_chunkattn.planning.prefill import Segment, pack_segments
from pallas_kernels.selection import ChunkSelector
from pallas_kernels.windows import Window, WindowMap
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.rule.choices import logits_by_the_definition
from tests.jax_chunkattn.toy import token_tree, toy_model, windowed_model

CHUNKS, SLOTS, COLUMNS = 4000, 4, 64
SELECTOR = ChunkSelector(0.3, recent=1, refresh=4, whole=0)
CACHE = CacheConfig(CHUNKS, 16, selector=SELECTOR)
SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=16, num_heads=4)


def arguments(cache):
    """A pool large enough to notice, and a plan of 4 rows behind a shared prefix."""
    pool = empty_pool(toy_model().cache_spec, cache, SLOTS, COLUMNS)
    tables = [[*range(40), 100 + row, 200 + row] for row in range(4)]
    plan, _ = plan_decode(
        tables, [40 * 16 + 3] * 4, chunk_size=16, num_chunks=CHUNKS, columns=COLUMNS
    )
    rows = RowState(*np.array([[1] * 4, [40 * 16 + 3] * 4, [20] * 4], np.int32))
    state = DeviceState(pool, RequestTable.of(rows, [], toy_model().vocab_size))
    return state, np.arange(4, dtype=np.int32), plan


def sizes_of(pool):
    arrays = jax.tree.leaves(pool)
    return {
        "pool_bytes": sum(array.nbytes for array in arrays),
        "layer_bytes": max(array.nbytes // array.shape[0] for array in arrays),
    }


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("codec", ["identity", pytest.param("int8", marks=pytest.mark.thorough)])
def test_no_call_copies_the_pool(codec):
    state, slots, plan = arguments(replace(CACHE, codec=codec))
    model, programs = SplitModel.of(toy_model()), Programs()
    args = state, slots, plan
    program, _ = programs.compiled(Invocation(decode_steps, model, args, {"num_steps": 8}))
    assert_pool_is_updated_in_place(program, **sizes_of(state.pool))
    segment = Segment([1] * 100, list(range(30)), begin=320, end=420, write_from=320, tail_slot=1)
    batch = pack_segments(
        [segment], num_tokens=128, chunk_size=16, num_chunks=CHUNKS, num_slots=SLOTS
    )
    args = state, np.full(8, SLOTS, np.int32), batch
    program, _ = programs.compiled(Invocation(prefill_step, model, args))
    assert_pool_is_updated_in_place(program, **sizes_of(state.pool))


@pytest.mark.parametrize(
    ("policy", "codec", "more"),
    [
        ("scores", "identity", 2 * 2 * (16 * 16 // 2 + 2 * 2 * 16)),  # 4 bits, scale and zero
        ("scores", "int4", 0),  # what the pool stores
        ("bounds", "identity", 2 * 2 * 2 * 16 * 4),
        ("hip", "identity", 0),
    ],
)
def test_landmarks_count_as_what_a_chunk_takes(policy, codec, more):
    cache = CacheConfig(10, 16, codec=codec)
    selective = replace(cache, selector=replace(SELECTOR, policy=policy))
    assert selective.bytes_per_chunk(SPEC) == cache.bytes_per_chunk(SPEC) + more
    pool = empty_pool(SPEC, selective, SLOTS, COLUMNS)
    assert isinstance(pool, SelectivePool)
    assert sum(array.nbytes for array in pool.landmarks.values()) == 10 * more


@pytest.mark.slow
def test_rows_that_read_all_run_the_program_without_choices_until_one_is_to_choose():
    """Of three chunks and fewer all is read: a row of 40 tokens chooses from its 49th on."""
    selector, [prompt] = replace(SELECTOR, whole=3), token_tree((1, 40), seed=12)
    engine = make_engine(selector=selector)
    tokens = engine.submit(prompt, SamplingParams(5)).result().tokens
    assert engine.stats.reads is None
    whole = engine.submit(prompt, SamplingParams(40)).result().tokens
    assert whole[:5] == tokens
    assert engine.stats.reads is not None
    everything = [*prompt, *whole]
    logits = logits_by_the_definition(toy_model(), selector, 16, everything)
    assert list(whole) == logits.argmax(axis=1)[len(prompt) - 1 : -1].tolist()


@pytest.mark.slow
def test_nothing_is_compiled_when_choices_change():
    engine, compiled = make_engine(selector=SELECTOR), []
    for seed in (9, 10):
        engine.reset()
        prompts = token_tree((1, 150), (3, 30), seed=seed)
        for prompt in (*prompts, prompts[0][:-9], [*prompts[1], 3]):
            engine.submit(prompt, SamplingParams(20)).result()
        compiled.append(engine.stats.compilations)
    assert compiled[0] == compiled[1]


@pytest.mark.slow
def test_an_engine_tells_what_its_rows_have_read_and_how_alike():
    selector = replace(SELECTOR, dense_layers=(1,))
    engine, prompts = make_engine(selector=selector), token_tree((1, 150), (3, 30), seed=9)
    before = engine.stats
    assert before.reads is None
    list(engine.generate(prompts, SamplingParams(9)))
    reads = engine.stats.reads
    assert reads is not None
    # The first token of each comes from prefill, and the last is never fed.
    chunks = [(len(prompt) + step) // 16 + 1 for prompt in prompts for step in range(8)]
    chosen = [int(selector.counts(64)[there - 1]) for there in chunks]
    np.testing.assert_allclose(reads.there, sum(chunks))
    np.testing.assert_allclose(reads.read, [sum(chosen), sum(chunks)])
    assert reads.selected_share == pytest.approx((sum(chosen) / sum(chunks) + 1) / 2)
    (share, factor), dense = reads.by_layer
    assert share == pytest.approx(sum(chosen) / sum(chunks))
    assert dense == (1.0, None)
    assert factor == reads.union_factor
    assert factor is not None
    assert 1 < factor < 3

    engine.reset()
    engine.generate([prompts[0]], SamplingParams(9, n=3))
    again = engine.stats.reads
    assert again is not None
    together, each = again.together - reads.together, again.each - reads.each
    np.testing.assert_allclose(together, each, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": replace(SELECTOR, refresh=6)}, "6 positions, which do not divide a chunk"),
        ({"selector": replace(SELECTOR, dense_layers=(2,))}, "layer 2 is to read everything"),
        (
            {"selector": SELECTOR, "chunk_size": 256, "prefill_tokens": 128},
            "codec, selector or clusters",
        ),
        ({"selector": SELECTOR, "chunk_size": 5}, "4 positions, which do not divide a chunk of 5"),
    ],
)
def test_selectors_that_do_not_fit_are_refused_before_anything_is_allocated(options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


def test_a_model_whose_heads_all_have_windows_has_nothing_to_select_among():
    spec = replace(SPEC, windows=WindowMap.of_layers([Window(8), Window(8)], 2))
    with pytest.raises(ValueError, match="all heads have windows"):
        CACHE.check(spec)
    CACHE.check(windowed_model().cache_spec)
