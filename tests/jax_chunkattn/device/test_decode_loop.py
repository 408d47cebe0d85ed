from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, SamplingParams, allocate_pool, plan_decode
from jax_chunkattn.device import device, invocations
from jax_chunkattn.device.decode_loop import NOTHING, decode_steps
from jax_chunkattn.device.exact_pool import ChunkPool
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState, copy_chunks
from jax_chunkattn.planning.prefill import CALL_TOKENS, Segment, pack_segments
from tests.interpreted import skip_unless_there
from tests.jax_chunkattn.device.pool_copies import (
    assert_pool_is_updated_in_place,
    pool_sized_operations,
)
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import token_tree, toy_model

in_every_dtype = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
CHUNKS = 4000  # a layer of the pool then dwarfs every activation


def exact(state) -> ChunkPool:
    """The pool of a state, whose chunks are stored as they are."""
    assert isinstance(state.pool, ChunkPool)
    return state.pool


def decode_arguments(dtype):
    """A pool large enough to notice, and a plan of 4 rows behind a shared prefix."""
    pool = allocate_pool(toy_model().cache_spec, CacheConfig(CHUNKS, 16, dtype))
    tables = [[*range(40), 100 + row, 200 + row] for row in range(4)]
    plan, _ = plan_decode(tables, [40 * 16 + 3] * 4, chunk_size=16, num_chunks=CHUNKS)
    rows = RowState(*np.array([[1] * 4, [40 * 16 + 3] * 4, [20] * 4], np.int32))
    table = RequestTable.of(rows, [], toy_model().vocab_size)
    return DeviceState(pool, table), np.arange(4, dtype=np.int32), plan


def pool_sizes(state):
    pool = state.pool
    return {
        "pool_bytes": pool.keys.nbytes + pool.values.nbytes,
        "layer_bytes": pool.keys.nbytes // pool.keys.shape[0],
    }


def check_there_is_what_writes(dtype):
    """XLA does not, with some versions of it."""
    if dtype == "bfloat16":
        skip_unless_there("native")


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("native", "float32"),
        pytest.param("xla", "float32", marks=pytest.mark.slow),
        pytest.param("native", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_decoding_updates_the_pool_in_place(implementation, dtype):
    skip_unless_there(implementation)
    args = decode_arguments(dtype)
    model = SplitModel.of(toy_model())
    static = {"num_steps": 8, "implementation": implementation}
    program, _ = Programs().compiled(Invocation(decode_steps, model, args, static))
    assert_pool_is_updated_in_place(program, **pool_sizes(args[0]))


@pytest.mark.slow
@pytest.mark.optimised
@in_every_dtype
def test_prefill_updates_the_pool_in_place(dtype):
    check_there_is_what_writes(dtype)
    state = decode_arguments(dtype)[0]
    segment = Segment([1] * 100, list(range(30)), begin=320, end=420, write_from=320)
    batch = pack_segments([segment], num_tokens=128, chunk_size=16, num_chunks=CHUNKS)
    args = (state, np.full(8, 4, np.int32), batch)
    program, _ = Programs().compiled(Invocation(prefill_step, SplitModel.of(toy_model()), args))
    assert_pool_is_updated_in_place(program, **pool_sizes(state))


@pytest.mark.optimised
@in_every_dtype
def test_copying_chunks_updates_the_pool_in_place(dtype):
    check_there_is_what_writes(dtype)
    state = decode_arguments(dtype)[0]
    ids = np.zeros(8, np.int32)
    program, _ = Programs().compiled(Invocation(copy_chunks, None, (state, ids, ids)))
    assert_pool_is_updated_in_place(program, **pool_sizes(state))


def test_copies_read_every_source_before_a_destination_is_written():
    """Chunk 2 is given away and written to by the same call; 9 and more are nobody's."""
    pool = allocate_pool(toy_model().cache_spec, CacheConfig(9, 16))
    pool = dataclasses.replace(pool, keys=pool.keys + jnp.arange(9.0)[None, None, :, None, None])
    state = DeviceState(pool, RequestTable.empty(4, 8))
    sources, destinations = np.array([[2, 5, 7, 0], [3, 2, 0, 9]], np.int32)
    copied = jax.jit(copy_chunks)(state, sources, destinations).pool
    expected = np.array([7, 1, 5, 2, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(copied.keys[1, 1, :, 3, 2], expected)
    assert not np.asarray(copied.values).any()


@pytest.mark.optimised
def test_the_detector_finds_a_pool_that_is_copied():
    """The same loop with the pool as scan inputs and outputs, and one that keeps the old pool."""
    state = decode_arguments("float32")[0]
    pool, sizes = exact(state), pool_sizes(state)

    def through_xs_and_ys(keys):
        def layer(total, keys):
            keys = keys.at[:, 0, 0].set(total)
            return total + keys[0, 1, 1, 0], keys

        return jax.lax.scan(layer, jnp.float32(0), keys)

    def keeps_both(keys):
        return keys.at[0, 0, 0].set(1.0), keys.sum(), keys

    for copying in (through_xs_and_ys, keeps_both):
        compiled = jax.jit(copying, donate_argnums=0).lower(pool.keys).compile()
        with pytest.raises(AssertionError):
            assert_pool_is_updated_in_place(compiled, **sizes)
    plus_one = jax.jit(lambda keys: keys + 1).lower(pool.keys).compile()
    assert pool_sized_operations(plus_one.as_text() or "", sizes["layer_bytes"])


def with_remaining(state, remaining):
    rows = dataclasses.replace(state.table.rows, remaining=np.array(remaining, np.int32))
    return dataclasses.replace(state, table=dataclasses.replace(state.table, rows=rows))


def test_frozen_rows_choose_nothing_and_write_nothing():
    state, slots, plan = decode_arguments("float32")
    state = with_remaining(state, [20, 0, 2, 0])
    slots[3] = 4  # no slot
    decode = jax.jit(functools.partial(decode_steps, toy_model(), num_steps=5))
    new, chosen = decode(state, slots, plan)
    chosen = np.asarray(chosen.tokens)
    assert (chosen[:, [1, 3]] == NOTHING).all()
    assert (chosen[:, 0] != NOTHING).all()
    assert (chosen[:2, 2] != NOTHING).all()
    assert (chosen[2:, 2] == NOTHING).all()
    rows, before = new.table.rows, state.table.rows
    np.testing.assert_array_equal(rows.lengths - before.lengths, [5, 0, 2, 0])
    np.testing.assert_array_equal(rows.remaining, [15, 0, 0, 0])
    counted = np.asarray(new.table.counts.generated)
    np.testing.assert_array_equal(counted.sum(axis=1), [5, 0, 2, 0])
    assert (counted[0, chosen[:, 0]] > 0).all()
    written = np.asarray(exact(new).keys != exact(state).keys).any(axis=(0, 1, 4))
    expected = np.zeros_like(written)
    expected[100, 3:8] = True
    expected[102, 3:5] = True
    np.testing.assert_array_equal(written, expected)


def test_the_loop_ends_when_all_rows_are_frozen():
    """K much larger than what is left costs nothing: the steps are not run."""
    state, slots, plan = decode_arguments("float32")
    state = with_remaining(state, [3] * 4)
    calls = []

    class CountingModel:
        cache_spec = toy_model().cache_spec
        vocab_size = toy_model().vocab_size
        max_positions = toy_model().max_positions

        def __call__(self, tokens, positions, pool, attend):
            jax.debug.callback(lambda: calls.append(1))
            return toy_model()(tokens, positions, pool, attend)

        def logits(self, hidden):
            return toy_model().logits(hidden)

    loop = jax.jit(functools.partial(decode_steps, CountingModel(), num_steps=50))
    jax.block_until_ready(loop(state, slots, plan))
    jax.effects_barrier()
    assert len(calls) == 3


def test_200_steps_with_rows_coming_and_going_compile_nothing_new(monkeypatch):
    """Rows finish and join inside one bucket of 8; lengths grow over many chunk boundaries."""
    monkeypatch.setattr(device, "PROGRAMS", Programs())
    sizes = len(CALL_TOKENS)
    traced_once = chex.assert_max_traces(decode_steps, n=1)
    traced_by_size = chex.assert_max_traces(prefill_step, n=sizes)
    monkeypatch.setattr(invocations, "decode_steps", traced_once)
    monkeypatch.setattr(invocations, "prefill_step", traced_by_size)
    engine = make_engine()
    prompts = token_tree((1, 160), (2, 20), (20, 11))
    lengths = [30 + 11 * (i % 7) for i in range(len(prompts))]
    waiting = list(zip(prompts, lengths, strict=True))
    running = []

    def decode(steps):
        calls = engine.stats.calls
        while engine.stats.calls < calls + steps // 3:
            running[:] = [handle for handle in running if not handle.done]
            while len(running) < 8:
                prompt, length = waiting.pop(0)
                running.append(engine.submit(prompt, SamplingParams(max_tokens=length)))
            engine.step()

    for size in CALL_TOKENS:  # warm-up: prompts that fill each size of call
        engine.submit([7] * size, SamplingParams(max_tokens=1)).result()
    first = engine.submit([7] * 20, SamplingParams(max_tokens=1))
    engine.submit([7] * 15 + [8] * 9, SamplingParams(max_tokens=1)).result()  # copies a part
    assert first.done
    decode(9)
    warm = engine.stats.compilations
    assert warm == 3 + sizes  # rows are placed, chunks copied, tokens decoded, prompts computed
    decode(201)
    assert engine.stats.compilations == warm
    assert engine.stats.plans > 20
    assert len(prompts) - len(waiting) > 16
