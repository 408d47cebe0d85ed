"""Mosaic GPU kernels over encoded chunks, to compile."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from experiments.compile_report.cases import Case, CaseTable, abstract, abstract_plan
from experiments.compile_report.target import GpuTarget
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.codecs import codec_of
from pallas_kernels.coded_kv import CodedKV
from pallas_kernels.plans import DecodeReads, OwnChunks

ROWS, KV_HEADS, LAYERS, CHUNKS = 64, 8, 2, 1024
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int4, two warpgroups": {"codec": "int4", "query_tile": 128},
    "int4, small chunks and heads": {"codec": "int4", "chunk_size": 16, "head_dim": 64},
    "int4, small chunks of float16": {"codec": "int4", "chunk_size": 16, "dtype": "float16"},
    "int4, large chunks": {"codec": "int4", "chunk_size": 256, "group": 16, "softcap": 50.0},
    "int8 and int4, large chunks": {"codec": "int8/int4", "chunk_size": 256, "group": 3},
    "fp8": {"codec": "fp8"},
    "fp8_e5m2, small chunks": {"codec": "fp8_e5m2", "chunk_size": 16, "dtype": "float16"},
    "int8, large chunks, two warpgroups": {
        "codec": "int8",
        "chunk_size": 256,
        "head_dim": 64,
        "query_tile": 128,
    },
}


def coded_case(
    target: GpuTarget,
    codec: str,
    dtype: str = "bfloat16",
    head_dim: int = 128,
    chunk_size: int = 64,
    group: int = 4,
    query_tile: int = 64,
    softcap: float | None = None,
) -> Case:
    """Decode attention with abstract arguments."""
    mosaic = importlib.import_module("pallas_kernels.chunk_attention.pallas_mosaic_gpu")
    chunk_codec = codec_of(codec)
    assert chunk_codec is not None
    attention = AttentionSpec.of(KV_HEADS * group, KV_HEADS, head_dim, softcap=softcap)
    outer = LAYERS, KV_HEADS

    def encoded(part):
        arrays = part.arrays(chunk_size, head_dim)
        return {name: abstract((*outer, CHUNKS, *a.shape), a.dtype) for name, a in arrays.items()}

    codes = encoded(chunk_codec.keys), encoded(chunk_codec.values)
    tails = abstract((*outer, ROWS, chunk_size, head_dim), dtype)

    def attend(q, codes, layer, tails, plan, lengths, slots):
        keys, values = codes
        stored = CodedKV(keys, values, layer, chunk_codec, chunk_size, head_dim)
        reads = DecodeReads(plan, lengths, OwnChunks(tails, tails, slots))
        return mosaic.chunk_attention(q, stored, reads, attention, query_tile=query_tile)

    q = abstract((ROWS, KV_HEADS * group, head_dim), dtype)
    of_rows = abstract((ROWS,))
    return Case(attend, (q, codes, abstract(()), tails, abstract_plan(ROWS), of_rows, of_rows))


def cases() -> CaseTable:
    return {name: partial(coded_case, **how) for name, how in VARIANTS.items()}
