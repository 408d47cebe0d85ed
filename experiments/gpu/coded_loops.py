"""The timed loops of `experiments.gpu.loops` over encoded chunks, each row's last chunk exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.gpu.bench import Bench, Program
from experiments.gpu.clock import Side
from experiments.gpu.loops import LoopSize, PlannedCase
from experiments.gpu.pools import random_buffer
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import ChunkCodec, TensorCodec, codec_of
from pallas_kernels.coded_kv import CodedKV, Encoded
from pallas_kernels.plans import DecodeReads, OwnChunks

MEASURED_BYTES = 1 << 32  # of all layers' codes: far more than a cache holds


@dataclass(frozen=True)
class CodedLoop:
    """A case over encoded chunks, which are random: no kernel's time depends on what they are."""

    planned: PlannedCase
    codec: ChunkCodec
    layers: int

    @classmethod
    def of(cls, planned: PlannedCase, name: str) -> CodedLoop:
        codec = codec_of(name)
        assert codec is not None, "a codec that needs no file"
        pool = planned.pool
        of_head = codec.head_bytes(pool.chunk_size, pool.head_dim)
        layers = MEASURED_BYTES // (of_head * pool.kv_heads * pool.num_chunks)
        return cls(planned, codec, max(1, min(layers, pool.layers)))

    @property
    def bytes_per_token(self) -> float:
        """That a layer's codes take."""
        pool = self.planned.pool
        of_head = self.codec.head_bytes(pool.chunk_size, pool.head_dim)
        return of_head * pool.kv_heads / pool.chunk_size

    def operands(self) -> tuple[Encoded, Encoded, jax.Array, jax.Array]:
        """Codes of keys and of values, and rows' own chunks."""
        pool = self.planned.pool
        outer = self.layers, pool.kv_heads

        def encoded(part: TensorCodec, seed: int) -> Encoded:
            arrays = part.arrays(pool.chunk_size, pool.head_dim)
            return {
                name: _random(seed + index, (*outer, pool.num_chunks, *array.shape), array.dtype)
                for index, (name, array) in enumerate(arrays.items())
            }

        tails = (*outer, len(self.planned.lengths), pool.chunk_size, pool.head_dim)
        dtype = jnp.dtype(self.planned.case.dtype)
        own = _random(20, tails, dtype), _random(21, tails, dtype)
        return encoded(self.codec.keys, 0), encoded(self.codec.values, 10), *own

    def program(self, implementation: str, size: LoopSize) -> Program:
        """The loop, called with (q, codes, codes, own keys, own values, plan, lengths, layer)."""
        case, pool, codec = self.planned.case, self.planned.pool, self.codec
        sizes = case.num_heads, case.num_kv_heads, case.head_dim
        attention = AttentionSpec.of(*sizes, scale=case.scale, softcap=case.softcap)

        @jax.jit
        def call_once(q, keys, values, own, plan, lengths, layer):
            stored = CodedKV(keys, values, layer, codec, pool.chunk_size, pool.head_dim)
            reads = DecodeReads(plan, lengths, own)
            return CHUNK_ATTENTION.attend(
                q, stored, reads, attention, implementation=implementation
            )

        def run(q, keys, values, own_keys, own_values, plan, lengths, first):
            own = OwnChunks(own_keys, own_values, jnp.arange(len(lengths), dtype=jnp.int32))

            def turn(index, q):
                for ahead in range(size.unrolled):
                    layer = lax.rem(first + index * size.unrolled + ahead, jnp.int32(self.layers))
                    q = call_once(q, keys, values, own, plan, lengths, layer)
                return q

            return lax.fori_loop(0, size.calls // size.unrolled, turn, q)

        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        lengths = jax.ShapeDtypeStruct(self.planned.lengths.shape, jnp.int32)
        operands = jax.eval_shape(self.operands)
        arguments = (self.planned.queries, *operands, self.planned.plan, lengths, scalar)
        shapes = jax.tree.map(lambda x: (jnp.shape(x), str(x.dtype)), arguments)
        key = ("coded loop", implementation, codec.name, size, *jax.tree.leaves(shapes))
        return Program(key, run, arguments)

    def side(self, bench: Bench, program: Program, size: LoopSize) -> Side:
        """The loop as something to time.

        Raises:
          Exception: what its compilation raised.
        """
        run = bench.get(program)
        operands = self.operands()
        plan, lengths = jax.device_put((self.planned.plan, self.planned.lengths))
        queries = self.planned.queries
        q = _random(bench.seed, queries.shape, queries.dtype)
        first = [jnp.int32(i * size.calls % self.layers) for i in range(self.layers)]

        def call(index: int) -> Any:
            return run(q, *operands, plan, lengths, first[index % len(first)])

        return Side(call, size.calls)


def _random(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Any codes, or small numbers."""
    dtype = np.dtype(dtype)
    if np.issubdtype(dtype, np.integer):
        return jax.random.bits(jax.random.key(seed), shape, dtype)
    return random_buffer(jax.random.key(seed), shape, dtype.name)
