"""Small kernels and loops around them to compile: good ones, and one for every fault."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from experiments.compile_report.cases import Case, CaseTable, abstract
from experiments.compile_report.program_sizes import ProgramSize
from experiments.compile_report.programs import decode_case, prefill_case
from experiments.compile_report.target import GpuTarget
from experiments.compile_report.tensor_parallel import tensor_parallel_case
from models.config import DecoderConfig

LAYERS, CHUNKS, CHUNK_SIZE, HEAD_DIM = 3, 4096, 16, 64
POOL = abstract((LAYERS, CHUNKS, CHUNK_SIZE, HEAD_DIM), jnp.bfloat16)
LAYER_BYTES = CHUNKS * CHUNK_SIZE * HEAD_DIM * 2
SMALL = ProgramSize(
    DecoderConfig(512, 256, 512, 3, 16, 8, 64), rows=16, num_chunks=1024, steps=4, prefill_tokens=32
)
ONE_MORE = replace(SMALL, config=replace(SMALL.config, num_layers=SMALL.config.num_layers + 1))


def read_chunk(layer, keys, queries, num_warps: int = 4):
    """queries [16, D] times the first chunk of a layer, [C, D]."""

    def kernel(layer, keys, queries, scores):
        scores[...] = plt.dot(queries[...], keys[layer[0], 0].T)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((16, CHUNK_SIZE), jnp.float32),
        grid=(1,),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=2),
        name="read_chunk",
    )(jnp.reshape(layer, 1), keys, queries)


def kernel_case(target: GpuTarget, num_warps: int = 4) -> Case:
    queries = abstract((16, HEAD_DIM), jnp.bfloat16)
    return Case(partial(read_chunk, num_warps=num_warps), (abstract(()), POOL, queries))


def spilling_case(target: GpuTarget) -> Case:
    """A tile of 128 x 256 float32 sums in the registers of one warp."""

    def kernel(a, b, out):
        def step(index, total):
            part = pl.ds(index * 64, 64)
            return total + plt.dot(a[:, part], b[part, :])

        out[...] = lax.fori_loop(0, 8, step, jnp.zeros(out.shape, jnp.float32))

    def spill(a, b):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((128, 256), jnp.float32),
            compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
            name="spill",
        )(a, b)

    return Case(spill, (abstract((128, 512), jnp.bfloat16), abstract((512, 256), jnp.bfloat16)))


def loop_case(layer_step, target: GpuTarget) -> Case:
    """Eight steps over all layers, each writing to the donated pool and reading it in a kernel."""

    def run(keys, queries):
        def step(_, carry):
            return layer_step(*carry)

        return lax.fori_loop(0, 8, step, (keys, queries))

    arguments = (POOL, abstract((16, HEAD_DIM), jnp.bfloat16))
    return Case(run, arguments, (0,), LAYERS * LAYER_BYTES, LAYER_BYTES)


def _fold(queries, scores):
    return queries + scores.sum().astype(queries.dtype)


def whole_pool(keys, queries):
    """The pool in the carry, the kernel given the whole of it and a layer index."""

    def layer_step(carry, layer):
        keys, queries = carry
        keys = keys.at[layer, 1, 2].set(queries[0])
        return (keys, _fold(queries, read_chunk(layer, keys, queries))), None

    carry, _ = lax.scan(layer_step, (keys, queries), jnp.arange(LAYERS, dtype=jnp.int32))
    return carry


def slice_of_the_pool(keys, queries):
    """The kernel given one layer, cut out of the pool."""

    def layer_step(carry, layer):
        keys, queries = carry
        keys = keys.at[layer, 1, 2].set(queries[0])
        scores = read_chunk(jnp.int32(0), keys[layer][None], queries)
        return (keys, _fold(queries, scores)), None

    carry, _ = lax.scan(layer_step, (keys, queries), jnp.arange(LAYERS, dtype=jnp.int32))
    return carry


def pool_as_scanned(keys, queries):
    """The pool as the scan's inputs and outputs."""

    def layer_step(queries, keys):
        keys = keys.at[1, 2].set(queries[0])
        return _fold(queries, read_chunk(jnp.int32(0), keys[None], queries)), keys

    queries, keys = lax.scan(layer_step, queries, keys)
    return keys, queries


def not_donated(target: GpuTarget) -> Case:
    case = loop_case(whole_pool, target)
    return Case(case.function, case.arguments, (), case.pool_bytes, case.layer_bytes)


def cases() -> CaseTable:
    return {
        "kernel": kernel_case,
        "three warps": partial(kernel_case, num_warps=3),
        "spill": spilling_case,
        "whole pool": partial(loop_case, whole_pool),
        "slice of the pool": partial(loop_case, slice_of_the_pool),
        "pool as scanned": partial(loop_case, pool_as_scanned),
        "not donated": not_donated,
        "decode": partial(decode_case, SMALL, "xla"),
        "prefill": partial(prefill_case, SMALL, "xla"),
        "decode on 4 GPUs": partial(tensor_parallel_case, SMALL, "xla", 4),
        "decode of a layer more on 4 GPUs": partial(tensor_parallel_case, ONE_MORE, "xla", 4),
    }
