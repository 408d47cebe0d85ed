"""Run by `test_sharding`, in a process of its own: JAX counts its devices once."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

import models
from jax_chunkattn import ChunkPool, SamplingParams, plan_decode
from jax_chunkattn.device.decode_loop import Chosen, decode_steps
from jax_chunkattn.device.logical_axes import logical_sharding
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState
from models.decoder import Decoder
from models.dense_attention import empty_pool, run_dense
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import SHARE_ALL

TOKENS = np.array([5, 200, 17, 17, 3], np.int32)
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


def pool_shape(model: Decoder) -> tuple[int, ...]:
    spec = model.cache_spec
    return spec.num_layers, spec.num_kv_heads, CHUNKS, CHUNK_SIZE, spec.head_dim


def decode(model: Decoder, pool: ChunkPool) -> tuple[Compiled, ChunkPool, Chosen]:
    """Three tokens for each of two rows that share a chunk, by a program that is given the pool."""
    tables, lengths = [[0, 1], [0, 2]], [20, 27]
    plan, _ = plan_decode(
        tables, lengths, chunk_size=CHUNK_SIZE, num_chunks=CHUNKS, options=SHARE_ALL
    )
    rows = RowState(*np.array([[7, 8], lengths, [9, 9]], np.int32))
    table = RequestTable.of(rows, [SamplingParams(logprobs=1)] * 2, model.vocab_size)
    args = DeviceState(pool, table), np.arange(2, dtype=np.int32), plan
    split = SplitModel.of(model)
    program, _ = Programs().compiled(Invocation(decode_steps, split, args, {"num_steps": 3}))
    state, chosen = program(split.leaves, *args)
    return program, state.pool, chosen


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
    check_programs(mesh)
