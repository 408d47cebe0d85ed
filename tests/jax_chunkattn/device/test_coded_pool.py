"""A pool of encoded chunks: its bytes, and that each chunk is encoded once, where it lies."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, CacheSpec, Engine, SamplingParams, allocate_pool, plan_decode
from jax_chunkattn.device.coded_pool import CodedPool
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import (
    DeviceState,
    RequestTable,
    RowState,
    copy_chunks,
    write_chunk,
)
from jax_chunkattn.planning.prefill import Segment, pack_segments
from pallas_kernels.codecs import AffineCodec, ChunkCodec, CodecError
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import token_tree, toy_model

SMOLLM2 = CacheSpec(30, 3, 64, 9)
SPEC = toy_model().cache_spec
SLOTS = 4


def state_of(num_chunks, lengths, remaining=20):
    """Rows in the first slots, with tails of ones."""
    pool = CodedPool.allocate(SPEC, CacheConfig(num_chunks, 16, codec="int4"), SLOTS)
    tails = jnp.ones_like(pool.tail_keys)
    pool = dataclasses.replace(pool, tail_keys=tails, tail_values=tails)
    rows = np.zeros((3, SLOTS), np.int32)
    rows[:, : len(lengths)] = np.array([[1] * len(lengths), lengths, [remaining] * len(lengths)])
    return DeviceState(pool, RequestTable.of(RowState(*rows), [], toy_model().vocab_size))


def sizes_of(pool):
    codes = jax.tree.leaves((pool.keys, pool.values))
    return {
        "pool_bytes": sum(array.nbytes for array in codes),
        "layer_bytes": pool.keys["codes"].nbytes // SPEC.num_layers,
    }


@pytest.mark.parametrize(("codec", "of_float16"), [("int8", 1.88), ("int4", 3.55), ("int2", 6.4)])
def test_tokens_in_the_same_memory(codec, of_float16):
    """Codes, scales and tails together, against a pool of the same memory that stores float16."""
    memory, rows = 2**32, 8

    def tokens(**config):
        cache = CacheConfig(memory=memory, **config)
        num_chunks = cache.chunks_for(SMOLLM2, rows)
        if cache.chunk_codec is None:
            pool = jax.eval_shape(functools.partial(allocate_pool, SMOLLM2, cache))
        else:
            pool = jax.eval_shape(functools.partial(CodedPool.allocate, SMOLLM2, cache, rows))
        held = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(pool))
        beside = rows * cache.exact_bytes(SMOLLM2) if cache.chunk_codec is not None else 0
        assert held == num_chunks * cache.bytes_per_chunk(SMOLLM2) + beside
        assert memory - cache.bytes_per_chunk(SMOLLM2) < held <= memory
        return num_chunks * cache.chunk_size

    coded = tokens(codec=codec, dtype="float16")
    assert coded / tokens(dtype="float16") > of_float16 - 0.05
    assert coded / tokens(dtype="float32") > 2 * of_float16 - 0.1


@pytest.mark.slow
@pytest.mark.optimised
def test_decoding_and_prefill_update_codes_and_tails_in_place():
    state = state_of(16_000, [16, 16])  # codes are small: activations must be smaller
    tables = [[1, 2, 3], [4, 5, 6]]
    plan, _ = plan_decode(tables, [16, 16], chunk_size=16, num_chunks=16_000)
    model, slots = SplitModel.of(toy_model()), np.arange(2, dtype=np.int32)
    static = {"num_steps": 8, "implementation": "xla"}
    batch = pack_segments(
        [Segment([1] * 100, list(range(30)), 320, 420, 320)],
        num_tokens=128,
        chunk_size=16,
        num_chunks=16_000,
        num_slots=SLOTS,
    )
    ids = np.zeros(8, np.int32)
    spec = toy_model().cache_spec
    given = np.zeros((2, spec.num_layers, spec.num_kv_heads, 16, spec.head_dim), np.float32)
    for invocation in (
        Invocation(decode_steps, model, (state, slots, plan), static),
        Invocation(prefill_step, model, (state, np.full(8, SLOTS, np.int32), batch)),
        Invocation(copy_chunks, None, (state, ids, ids)),
        Invocation(write_chunk, None, (state, ids[0].reshape(()), ids[0].reshape(()), *given)),
    ):
        program, _ = Programs().compiled(invocation)
        assert_pool_is_updated_in_place(program, **sizes_of(state.pool))


def test_a_step_encodes_the_tails_that_it_fills_and_nothing_else():
    """Of rows with 13, 3, 15 and 7 tokens in their tails the third fills its own at the first step,
    the first at the third; the fourth is frozen."""
    state = state_of(40, [16 + 13, 16 + 3, 32 + 15, 7])
    table, pool = state.table, state.pool
    assert isinstance(pool, CodedPool)
    remaining = np.array([20, 20, 20, 0], np.int32)
    table = dataclasses.replace(table, rows=dataclasses.replace(table.rows, remaining=remaining))
    state = dataclasses.replace(state, table=table)
    tables = [[1, 2, 3], [1, 5, 6], [7, 8, 9, 10], [11, 12]]
    plan, _ = plan_decode(tables, [29, 19, 47, 7], chunk_size=16, num_chunks=40)
    decode = jax.jit(functools.partial(decode_steps, toy_model(), num_steps=3))
    new, _ = decode(state, np.arange(4, dtype=np.int32), plan)
    for codes in (*new.pool.keys.values(), *new.pool.values.values()):
        by_chunk = np.moveaxis(np.asarray(codes), 2, 0).reshape(40, -1)
        assert np.flatnonzero(by_chunk.any(axis=1)).tolist() == [2, 9]
    tails, before = np.asarray(new.pool.tail_keys), np.asarray(pool.tail_keys)
    changed = (tails != before).any(axis=(0, 1, 4))
    expected = np.zeros((SLOTS, 16), bool)
    expected[0, 13:] = expected[1, 3:6] = expected[2, [15, 0, 1]] = True
    np.testing.assert_array_equal(changed, expected)
    codec = pool.codec.keys  # the first row's tail is as it was encoded
    chex.assert_trees_all_equal(
        {name: array[:, :, 2] for name, array in new.pool.keys.items()},
        jax.jit(codec.encode)(tails[:, :, 0]),
    )


@pytest.mark.slow
def test_codes_are_never_written_twice():
    """Whoever shares a chunk reads what was encoded when it was computed first."""
    [prompt, other, _] = token_tree((1, 40), (3, 23), seed=3)
    engine = make_engine(codec="int8")
    engine.submit(prompt, SamplingParams(30)).result()

    def codes_of(prompt):
        state = engine._core.device._state
        assert state is not None
        pool = state.pool
        assert isinstance(pool, CodedPool)
        chunks = list(engine._core.tree.match(prompt).chunk_ids)
        return jax.tree.map(lambda array: np.asarray(array[:, :, chunks]), (pool.keys, pool.values))

    before = codes_of(prompt)
    assert len(before[0]["codes"][0, 0]) == 3
    for again in (prompt, prompt[:48], other, prompt[:33]):
        engine.submit(again, SamplingParams(20)).result()
        handle = engine.submit(again, SamplingParams(20), hold=True)
        engine.step()
        handle.fork(SamplingParams(9)).result()
    chex.assert_trees_all_equal(codes_of(prompt), before)


@pytest.mark.slow
def test_a_prompt_that_is_cached_as_a_whole_is_answered_as_when_it_was_not():
    """Its last chunk is computed again, to be read as it was computed, and not encoded again."""
    [prompt] = token_tree((1, 48), seed=4)
    engine = make_engine(codec="int8")
    first = engine.submit(prompt, SamplingParams(12, logprobs=0)).result()
    computed = engine.stats.prefill_tokens
    again = engine.submit(prompt, SamplingParams(12, logprobs=0)).result()
    assert engine.stats.prefill_tokens - computed == 16
    assert again.tokens == first.tokens
    logprobs = ([one.chosen for one in answer.logprobs] for answer in (first, again))
    np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-5)


def test_a_codec_shows_in_the_statistics_and_in_what_memory_holds():
    engine = make_engine(codec="int4/int2")
    stats = engine.stats
    assert stats.codec == "int4/int2"
    assert stats.bytes_per_chunk == CacheConfig(1, 16, codec="int4/int2").bytes_per_chunk(SPEC)
    assert make_engine().stats.codec == "identity"


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"codec": "int3"}, {}, "unknown codec 'int3'"),
        ({"codec": "int2", "chunk_size": 6}, {}, "6 tokens do not fill bytes"),
        ({"chunk_size": 48, "codec": "int8"}, {"prefill_tokens": 32}, "more than the 32"),
        (
            {"codec": ChunkCodec("mine", AffineCodec(4, "tokens", 5), AffineCodec(4, "channels"))},
            {},
            "'mine' cannot store keys: groups of 5 do not divide 64 tokens",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_allocated(config, options, message):
    with pytest.raises(CodecError, match=message):
        Engine(toy_model(), CacheConfig(10**9, **config), **options)


def test_an_exact_pool_is_not_made_of_a_config_with_a_codec():
    with pytest.raises(ValueError, match="not encoded by int8"):
        allocate_pool(SPEC, CacheConfig(4, codec="int8"))
    with pytest.raises(ValueError, match="not encoded"):
        CodedPool.allocate(SPEC, CacheConfig(4), 1)
    with pytest.raises(ValueError, match="within a chunk of 16"):
        pack_segments(
            [Segment([1], [0, 1], 17, 18, 17)],
            num_tokens=32,
            chunk_size=16,
            num_chunks=2,
            num_slots=1,
        )
