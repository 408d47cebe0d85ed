"""Attention over encoded chunks, as a side of the comparison: what the decode loop runs with a
codec, each row's last chunk exact beside the pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel.operands import CaseOperands
from jax_chunkattn import CacheConfig, CacheSpec
from jax_chunkattn.device.backend import choose_backend
from jax_chunkattn.planning.planner import plan_decode
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import ChunkCodec, codec_of
from pallas_kernels.coded_kv import CodedKV
from pallas_kernels.plans import DecodeReads, OwnChunks


def coded_attention(operands: CaseOperands, coded: tuple[str, str]) -> Callable[[], Any]:
    """A call of an implementation that attends to all chunks encoded by a codec but each row's
    last, [B, Hq, D]."""
    implementation, codec = coded
    case, chunk_codec = operands.case, codec_of(codec)
    assert chunk_codec is not None, "a side of its own"
    stored = _encoded(operands.keys, operands.values, chunk_codec)
    spec = CacheSpec(1, case.num_kv_heads, case.head_dim, case.num_heads)
    config = CacheConfig(operands.keys.shape[2], case.chunk_size, case.dtype, codec=codec)
    # As the loop plans it: without the token that the step writes, so the last chunk is private.
    plan, _ = plan_decode(
        operands.tables,
        [length - 1 for length in operands.row_lengths],
        chunk_size=case.chunk_size,
        num_chunks=operands.keys.shape[2],
        options=choose_backend(spec, config, implementation=implementation).planner,
    )
    slots = np.full(len(operands.lengths), operands.rows, np.int32)
    slots[: operands.rows] = np.arange(operands.rows)
    last = [
        table[(length - 1) // case.chunk_size]
        for table, length in zip(operands.tables, operands.row_lengths, strict=True)
    ]
    own = OwnChunks(operands.keys[:, :, last], operands.values[:, :, last], slots)
    reads = jax.device_put(DecodeReads(plan, operands.lengths, own))
    attention = AttentionSpec.of(
        case.num_heads, case.num_kv_heads, case.head_dim, scale=case.scale, softcap=case.softcap
    )
    attend = jax.jit(
        partial(CHUNK_ATTENTION.attend, attention=attention, implementation=implementation)
    )
    return lambda: attend(operands.q, stored, reads)


def coded_bytes(operands: CaseOperands, codec: str) -> int:
    """Bytes that a step reads at least: each distinct chunk's codes, and the rows' last chunks."""
    case, chunk_codec = operands.case, codec_of(codec)
    assert chunk_codec is not None, "a side of its own"
    size = case.chunk_size
    of_head = chunk_codec.head_bytes(size, case.head_dim)
    tails = [(length - 1) % size + 1 for length in operands.row_lengths]
    full = {
        chunk
        for table, length in zip(operands.tables, operands.row_lengths, strict=True)
        for chunk in table[: (length - 1) // size]
    }
    exact = 2 * case.head_dim * jnp.dtype(case.dtype).itemsize * sum(tails)
    return case.num_kv_heads * (len(full) * of_head + exact)


@partial(jax.jit, static_argnums=2)
def _encoded(keys: jax.Array, values: jax.Array, codec: ChunkCodec) -> CodedKV:
    """The whole pool `[1, Hkv, N, C, D]`."""
    size, head_dim = keys.shape[3:]
    sides = codec.keys.encode(keys), codec.values.encode(values)
    return CodedKV(*sides, 0, codec, size, head_dim)
