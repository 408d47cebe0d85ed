"""The decode loop on several GPUs: the pool's KV heads sharded over a mesh axis.

The Flax decoder has no place yet for the sum over devices that follows a sharded projection, so a
decoder of attention layers alone stands in for it. The loop, the write into the pool and the
attention are the project's own, run under `shard_map` on each device's heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.compile_report.cases import Case, abstract
from experiments.compile_report.program_sizes import (
    ProgramSize,
    abstract_pool,
    decode_arguments,
    pool_sizes,
)
from experiments.compile_report.target import GpuTarget, device_mesh
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.pool import ChunkPool
from jax_chunkattn.device.request_table import DeviceState

AXIS = "tp"
NUM_DEVICES = 4


class AttentionOnlyDecoder:
    """A `DecoderModel` of attention layers without norms or MLPs, on one device's heads.

    The weights are `embedding [V, E]`, which is whole, and this device's heads of `qkv [L, E, (Hq +
    2 Hkv) D]` and `out [L, Hq D, E]`.
    """

    def __init__(self, weights: tuple, cache_spec: CacheSpec, max_positions: int):
        self.embedding, self.qkv, self.out = weights
        self.cache_spec = cache_spec
        self.vocab_size: int = self.embedding.shape[0]
        self.max_positions = max_positions

    def __call__(self, tokens, positions, pool, attend):
        spec = self.cache_spec

        def run_layer(carry, scanned):
            x, pool = carry
            qkv, out, layer = scanned
            heads = (x @ qkv).reshape(len(x), -1, spec.head_dim)
            q, k, v = jnp.split(heads, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
            attended, pool = attend(pool, layer, q, k, v)
            return (x + lax.psum(attended.reshape(len(x), -1) @ out, AXIS), pool), None

        layers = jnp.arange(spec.num_layers, dtype=jnp.int32)
        (x, pool), _ = lax.scan(
            run_layer, (self.embedding[tokens], pool), (self.qkv, self.out, layers)
        )
        return x, pool

    def logits(self, hidden):
        return jnp.matmul(hidden, self.embedding.T, preferred_element_type=jnp.float32)


def tensor_parallel_case(size: ProgramSize, implementation: str, target: GpuTarget) -> Case:
    """K steps for B rows on four GPUs, each with a quarter of the heads; the pool is donated.

    The pool has four times the chunks: as many bytes on each GPU as it has on one alone, where a
    layer of it dwarfs the logits.
    """
    size = replace(size, num_chunks=NUM_DEVICES * size.num_chunks)
    config = size.config
    mesh = device_mesh(target, NUM_DEVICES, AXIS)
    pool = abstract_pool(size)
    spec = replace(
        config.cache_spec,
        num_kv_heads=config.num_kv_heads // NUM_DEVICES,
        num_heads=config.num_heads // NUM_DEVICES,
    )
    layers, hidden = config.num_layers, config.hidden_size
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    weights = (
        abstract((config.vocab_size, hidden), size.dtype),
        abstract((layers, hidden, query_size + 2 * kv_size), size.dtype),
        abstract((layers, query_size, hidden), size.dtype),
    )
    whole: Any = PartitionSpec()
    by_head: Any = PartitionSpec(None, AXIS)
    placement = (
        (whole, PartitionSpec(None, None, AXIS), by_head),
        DeviceState(ChunkPool(by_head, by_head), whole),
        *(whole,) * 2,
    )

    def decode(weights, *arguments):
        model = AttentionOnlyDecoder(weights, spec, config.max_positions)
        return decode_steps(model, *arguments, num_steps=size.steps, implementation=implementation)

    sharded = jax.shard_map(
        decode,
        mesh=mesh,
        in_specs=placement,
        out_specs=(placement[1], whole),
        check_vma=False,
    )
    arguments = _placed((weights, *decode_arguments(size, pool)), placement, mesh)
    return Case(sharded, arguments, (1,), *pool_sizes(pool, NUM_DEVICES))


def _placed(arguments: tuple, placement: tuple, mesh) -> tuple:
    def place(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)

        def placed(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(placed, tree)

    return jax.tree.map(place, placement, arguments, is_leaf=lambda x: isinstance(x, PartitionSpec))
