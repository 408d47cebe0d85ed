"""Run by `test_sharding`, in a process of its own: JAX counts its devices once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

import models
from jax_chunkattn import CacheConfig, ChunkPool, SamplingParams, plan_decode
from jax_chunkattn.device.coded_pool import CodedPool
from jax_chunkattn.device.decode_loop import Chosen, decode_steps
from jax_chunkattn.device.logical_axes import logical_sharding
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from models.decoder import Decoder
from models.dense_attention import empty_pool, run_dense
from pallas_kernels import chunk_attention, prefill_attention
from pallas_kernels.pool_writes import copy_slots, put_tokens
from pallas_kernels.windows import Window
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import SHARE_ALL

TOKENS = np.array([5, 200, 17, 17, 3], np.int32)
AnyPool = TypeVar("AnyPool", ChunkPool, CodedPool)
CHUNKS, CHUNK_SIZE = 1000, 16  # a layer of the pool then dwarfs every activation


def check_weights(mesh: Mesh) -> None:
    """Halves of them lie on each device, and give the logits of the whole."""
    whole = logits(models.load("random:tiny").model)
    for unroll in (False, True):
        split = models.load("random:tiny", mesh=mesh, unroll=unroll).model
        shards = {
            "/".join(map(str, path)): leaf.get_value().addressable_shards[0].data
            for path, leaf in nnx.to_flat_state(nnx.state(split))
        }
        halves = {"qkv": (64, 1, 4, 16), "attention_out": (2, 16, 64), "down": (64, 64)}
        for name, shape in halves.items():
            if unroll:
                chex.assert_shape(shards[f"blocks/1/{name}"], shape)
            else:
                chex.assert_shape(shards[f"blocks/{name}"], (2, *shape))
        chex.assert_shape(shards["embedding"], (128, 64))
        chex.assert_shape(shards["final_norm"], (64,))
        chex.assert_trees_all_close(logits(split), whole, rtol=0, atol=1e-5)


def logits(model: Decoder) -> jax.Array:
    pool = empty_pool(model.cache_spec, 8)
    return run_dense(*nnx.split(model), TOKENS, np.arange(5, dtype=np.int32), pool)[0]


def check_decoding(mesh: Mesh) -> None:
    """Each device keeps half of the KV heads of every chunk, where it updates and attends to them,
    and rows choose what they choose on one device."""
    whole, split = models.load("random:tiny").model, models.load("random:tiny", mesh=mesh).model
    keys, values = np.random.default_rng(0).standard_normal((2, *pool_shape(whole)), np.float32)
    _, expected_pool, expected = decode(whole, ChunkPool(jnp.asarray(keys), jnp.asarray(values)))
    place = logical_sharding(ChunkPool.AXES, keys.shape, mesh)
    halves = ChunkPool(jax.device_put(keys, place), jax.device_put(values, place))
    program, pool, chosen = decode(split, halves)
    layers, kv_heads, *chunks = keys.shape
    for array in (pool.keys, pool.values):
        shards = [shard.data for shard in array.addressable_shards]
        chex.assert_shape(shards, (layers, kv_heads // 2, *chunks))
    half = keys.nbytes // 2
    assert_pool_is_updated_in_place(program, pool_bytes=2 * half, layer_bytes=half // layers)
    chex.assert_trees_all_equal(chosen.tokens, expected.tokens)
    chex.assert_trees_all_close(chosen.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(pool, expected_pool, rtol=0, atol=1e-5)


def check_decoding_encoded(mesh: Mesh) -> None:
    """The same with chunks that a codec encodes, and a row that fills one while it decodes."""
    whole, split = models.load("random:tiny").model, models.load("random:tiny", mesh=mesh).model
    config = CacheConfig(16 * CHUNKS, CHUNK_SIZE, codec="int4")  # a layer's codes are small
    random = np.random.default_rng(0)

    def numbers(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.uint8:
            return jnp.asarray(random.integers(0, 256, array.shape, np.uint8))
        return jnp.asarray(random.standard_normal(array.shape), array.dtype)

    exact = jax.tree.map(numbers, CodedPool.allocate(whole.cache_spec, config, 2))
    halves = jax.tree.map(lambda array: jax.device_put(array, half_of(array, mesh)), exact)
    before = np.asarray(exact.keys["codes"][:, :, 2])
    lengths = [20, 30]  # the second has its 32 tokens after two of three steps
    _, expected_pool, expected = decode(whole, exact, lengths)
    program, pool, chosen = decode(split, halves, lengths)
    for array in jax.tree.leaves(pool):
        layers, kv_heads, *rest = array.shape
        shards = [shard.data for shard in array.addressable_shards]
        chex.assert_shape(shards, (layers, kv_heads // 2, *rest))
    held = sum(array.nbytes for array in jax.tree.leaves((pool.keys, pool.values))) // 2
    layer = pool.keys["codes"].nbytes // 2 // pool.keys["codes"].shape[0]
    assert_pool_is_updated_in_place(program, pool_bytes=held, layer_bytes=layer)
    chex.assert_trees_all_equal(chosen.tokens, expected.tokens)
    chex.assert_trees_all_close(chosen.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(pool.tail_keys, expected_pool.tail_keys, rtol=0, atol=1e-5)
    sealed = np.asarray(pool.keys["codes"][:, :, 2])
    assert (sealed != before).any()
    # Of what a last bit decides there may be a few.
    assert (sealed != np.asarray(expected_pool.keys["codes"][:, :, 2])).mean() < 0.01


def half_of(array: jax.Array, mesh: Mesh) -> NamedSharding:
    axes = (*CodedPool.AXES, *(None,) * (array.ndim - len(CodedPool.AXES)))
    return logical_sharding(axes, array.shape, mesh)


def pool_shape(model: Decoder) -> tuple[int, ...]:
    spec = model.cache_spec
    return spec.num_layers, spec.num_kv_heads, CHUNKS, CHUNK_SIZE, spec.head_dim


def decode(
    model: Decoder, pool: AnyPool, lengths: Sequence[int] = (20, 27)
) -> tuple[Compiled, AnyPool, Chosen]:
    """Three tokens for each of two rows that share a chunk, by a program that is given the pool."""
    tables = [[0, 1], [0, 2, 3]]
    plan, _ = plan_decode(
        tables, lengths, chunk_size=CHUNK_SIZE, num_chunks=pool.num_chunks, options=SHARE_ALL
    )
    rows = RowState(*np.array([[7, 8], lengths, [9, 9]], np.int32))
    table = RequestTable.of(rows, [SamplingParams(logprobs=1)] * 2, model.vocab_size)
    args = DeviceState(pool, table), np.arange(2, dtype=np.int32), plan
    split = SplitModel.of(model)
    program, _ = Programs().compiled(Invocation(decode_steps, split, args, {"num_steps": 3}))
    state, chosen = program(split.leaves, *args)
    return program, state.pool, chosen


def check_attention(mesh: Mesh) -> None:
    """Each device attends for its heads: nothing is gathered, whichever implementation runs."""
    random = np.random.default_rng(0)
    shape = 1, 4, 10, CHUNK_SIZE, 16
    pool = random.standard_normal((2, *shape), np.float32)
    of_head = PartitionSpec(None, "tp")
    q, keys, values = (
        jax.device_put(array, NamedSharding(mesh, of_head))
        for array in (random.standard_normal((32, 8, 16), np.float32), *pool)
    )
    tables, lengths = [[0, 1, 2], [0, 1, 3], [4], [0, 5]], np.array([40, 33, 7, 20], np.int32)
    plan, _ = plan_decode(
        tables,
        lengths.tolist(),
        chunk_size=CHUNK_SIZE,
        num_chunks=10,
        options=SHARE_ALL,
        windows=(None, Window(9)),
    )
    segments = [
        Segment([7] * 9, table, length - 9, length, length - 9)
        for table, length in zip(tables[:2], [40, 33], strict=True)
    ]
    new = pack_segments(segments, num_tokens=32, chunk_size=CHUNK_SIZE, num_chunks=10)

    def attend(q, keys, values, windows):
        rows = chunk_attention(q[:4], keys, values, plan, lengths, head_windows=windows)
        tokens = prefill_attention(q, keys, values, new.plan, query_tile=QUERY_TILE)
        return rows, tokens

    def write(pool, new):
        at = np.arange(3, dtype=np.int32)
        return put_tokens(copy_slots(pool, at, at + 3, 2), new[:3, :4], 0, at, at)

    halves = keys.astype("bfloat16")
    writing = jax.jit(write, donate_argnums=0)
    assert "all-gather" not in str(writing.lower(halves, q).compile().as_text())
    written = write(np.asarray(halves), np.asarray(q))
    got = writing(halves, q)
    assert got.sharding.spec == of_head
    chex.assert_trees_all_equal(got, written)

    windows = np.array([0, 1, 1, 0], np.int32)
    split = jax.device_put(windows, NamedSharding(mesh, PartitionSpec("tp")))
    run = jax.jit(attend)
    assert "all-gather" not in str(run.lower(q, keys, values, split).compile().as_text())
    got = run(q, keys, values, split)
    assert {one.sharding.spec for one in got} == {of_head}
    expected = attend(np.asarray(q), np.asarray(keys), np.asarray(values), windows)
    chex.assert_trees_all_close(got, expected, rtol=0, atol=2e-6)


def check_programs(mesh: Mesh) -> None:
    """They are kept by where their arguments lie."""

    def negative(x):
        return -x

    programs = Programs()
    rows = NamedSharding(mesh, PartitionSpec("tp"))
    seconds = []
    for place in (*jax.devices(), rows, rows):
        x = jax.device_put(np.arange(4.0, dtype=np.float32), place)
        program, took = programs.compiled(Invocation(negative, None, (x,)))
        program([], x)
        seconds.append(took)
    assert seconds[-1] == 0 < min(seconds[:-1])


if __name__ == "__main__":
    chex.set_n_cpu_devices(2)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    check_weights(mesh)
    check_decoding(mesh)
    check_decoding_encoded(mesh)
    check_attention(mesh)
    check_programs(mesh)
