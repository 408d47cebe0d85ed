"""Cases over encoded chunks to check: what is stored, and the pool that a query reads in effect.

A query reads the chunks before its own decoded, and its own exact. The oracle reads both in a pool
of twice as many chunks: decoded ones, and behind them exact ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.planning.workloads import AttentionInputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import ChunkCodec, codec_of
from pallas_kernels.coded_kv import CodedKV, LayerKV
from pallas_kernels.plans import DecodePlan, DecodeReads, OwnChunks
from pallas_kernels.specs import AttentionCase

CODECS = ("int8", "int4", "int4/int2", "fp8")
TINY = ((AttentionCase("1,3_64,8", 6, 2, 32, chunk_size=16), "int4"),)
ALL = (
    *TINY,
    *(
        (AttentionCase("1,32_4096,40", 8, 2, 128, dtype="bfloat16", ragged=200), codec)
        for codec in CODECS
    ),
    (AttentionCase("1,17_3000,40", 3, 1, 80, dtype="bfloat16", ragged=300), "int4"),
    (AttentionCase("1,20_3000,9", 8, 1, 64, chunk_size=16, dtype="float16", ragged=70), "int4"),
    (AttentionCase("1,9_3000,64", 9, 3, 64, chunk_size=128, ragged=500, softcap=5.0), "int8"),
)
"""Decode problems and the names of codecs."""


def cases(small: bool) -> tuple[tuple[AttentionCase, str], ...]:
    return TINY if small else ALL


@dataclass(frozen=True)
class CodedPool:
    """The second layer of two of a pool, encoded, and what it holds.

    Attributes:
      stored: as a kernel reads it.
      keys, values: decoded chunks, and behind them exact ones: [Hkv, 2 N, C, D].
    """

    stored: CodedKV
    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, name: str, keys: np.ndarray, values: np.ndarray) -> CodedPool:
        """Of exact chunks of two layers, [2, Hkv, N, C, D]."""
        codec = _named(name)

        def encode(keys, values):
            codes = codec.keys.encode(keys), codec.values.encode(values)
            return codes, codec.keys.decode(codes[0])[1], codec.values.decode(codes[1])[1]

        codes, *decoded = jax.jit(encode)(keys, values)
        stored = CodedKV(codes[0], codes[1], jnp.int32(1), codec, *keys.shape[3:])
        exact = (pool[1].astype(np.float32) for pool in (keys, values))
        both = [np.concatenate(of_one, axis=1) for of_one in zip(decoded, exact, strict=True)]
        return cls(stored, *both)

    def table(self, chunk_ids: Sequence[int], length: int) -> list[int]:
        """What a query at position `length - 1` reads of `keys` and `values`."""
        own = (length - 1) // self.stored.chunk_size
        exact = self.stored.num_chunks + chunk_ids[own]
        return [*chunk_ids[:own], exact]


def planned_lengths(inputs: AttentionInputs) -> list[int]:
    """Tokens that a step is planned for: without the one that it writes, which needs no chunk."""
    return (inputs.lengths[: len(inputs.tables)] - 1).tolist()


def attend(backend: str, case: AttentionCase):
    """A function of what `arguments` gives: decode attention of a case, over full chunks and each
    row's own."""
    sizes = case.num_heads, case.num_kv_heads, case.head_dim
    attention = AttentionSpec.of(*sizes, scale=case.scale, softcap=case.softcap)

    def attend(q, stored, plan, lengths, own):
        reads = DecodeReads(plan, lengths, own)
        return CHUNK_ATTENTION.attend(q, stored, reads, attention, implementation=backend)

    return attend


def arguments(inputs: AttentionInputs, stored: LayerKV, plan: DecodePlan) -> tuple:
    """A row's own chunk is in the slot of its number; rows of padding have none."""
    size, rows = stored.chunk_size, len(inputs.tables)
    lengths = inputs.lengths[:rows]
    own = [
        table[(length - 1) // size] for table, length in zip(inputs.tables, lengths, strict=True)
    ]
    slots = np.arange(len(inputs.lengths), dtype=np.int32)
    keys, values = (jnp.asarray(chunks[:, :, own]) for chunks in (inputs.keys, inputs.values))
    return inputs.q, stored, plan, inputs.lengths, OwnChunks(keys, values, slots)


def _named(name: str) -> ChunkCodec:
    codec = codec_of(name)
    assert codec is not None
    return codec
