"""A peer in JAX: `jax.experimental.pallas.ops.gpu.paged_attention`, in Triton.

It knows block tables but no sharing: a chunk that many rows have is read once for each, from the
L2 cache where it is still there. Its pool is one layer's, [Hkv, pages, C, D]; the loop shows it all
layers as one and adds the layer's first page to the tables.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.gpu.bench import Bench, Program
from experiments.gpu.clock import Side
from experiments.gpu.loops import LoopSize, PlannedCase
from experiments.gpu.pools import Buffers
from experiments.gpu.tables import CaseTables

NAME = "jax paged_attention"
_MOST_SPLITS = 16  # its default
# Its default of 8 pages of 64 tokens needs 276 KiB of shared memory.
_BLOCK_TOKENS = 128


def unsupported(planned: PlannedCase) -> str | None:
    """Why it cannot run a case, or None."""
    try:
        _import()
    except ImportError as error:
        return f"jax {jax.__version__} does not have it: {error}"
    head_dim = planned.case.head_dim
    if head_dim & (head_dim - 1):
        return f"it takes a head_dim that is a power of two, not {head_dim}"
    return None


def program(
    planned: PlannedCase, tables: CaseTables, buffers: Buffers, size: LoopSize, interpret: bool
) -> Program:
    """Called with (q, keys, values, tables, lengths, first layer)."""
    layers, kv_heads, num_chunks, chunk_size, head_dim = planned.pool.shape
    flat = (kv_heads, layers * num_chunks, chunk_size, head_dim)
    width, splits = partition(tables.tables.shape[1], chunk_size)

    def run(q, keys, values, tables, lengths, first):
        # Here layers and heads have changed places: the numbers are random in either order.
        keys, values = keys.reshape(flat), values.reshape(flat)

        def call(q, ahead):
            layer = lax.rem(first + ahead, jnp.int32(layers))
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return _import()(
                    q * jnp.asarray(head_dim**-0.5, q.dtype),
                    keys,
                    values,
                    tables + layer * num_chunks,
                    lengths,
                    k_splits=splits,
                    pages_per_compute_block=block_pages(chunk_size),
                    interpret=interpret,
                ).astype(q.dtype)

        def turn(index, q):
            for ahead in range(size.unrolled):
                q = call(q, index * size.unrolled + ahead)
            return q

        return lax.fori_loop(0, size.calls // size.unrolled, turn, q)

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    batch = tables.rows
    q = jax.ShapeDtypeStruct((batch, *planned.queries.shape[1:]), planned.queries.dtype)
    table = jax.ShapeDtypeStruct((batch, width), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    arguments = (q, *buffers.abstract(planned.case.dtype), table, lengths, scalar)
    key = (NAME, planned.pool.shape, q.shape, str(q.dtype), width, size)
    return Program(key, run, arguments)


def side(
    bench: Bench,
    compiled: Program,
    planned: PlannedCase,
    tables: CaseTables,
    buffers: Buffers,
    size: LoopSize,
) -> Side:
    run = bench.get(compiled)
    keys, values = buffers.get(planned.case.dtype)
    padded = np.zeros(compiled.arguments[3].shape, np.int32)
    padded[:, : tables.tables.shape[1]] = tables.placed(planned.pool.num_chunks, bench.seed)
    table, lengths = jax.device_put((padded, np.asarray(tables.lengths, np.int32)))
    q = jax.random.normal(jax.random.key(bench.seed), compiled.arguments[0].shape, jnp.float32)
    q = q.astype(planned.case.dtype)
    first = jnp.int32(0)
    return Side(lambda _: run(q, keys, values, table, lengths, first), size.calls)


def block_pages(page: int) -> int:
    """Pages that it attends to in one step: a power of two."""
    return max(1, _BLOCK_TOKENS // page)


def partition(pages: int, page: int) -> tuple[int, int]:
    """Pages to pad a row's to, and parts to cut them into: whole steps, with the least padding."""
    step = block_pages(page)

    def padded(splits: int) -> int:
        return -(-pages // (splits * step)) * splits * step

    splits = min(range(_MOST_SPLITS, 7, -1), key=padded)
    return padded(splits), splits


def _import():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    return paged_attention
