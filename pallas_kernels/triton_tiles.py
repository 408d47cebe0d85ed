"""What the Triton kernels share: a tile of queries attending to a run of chunks.

Scores are kept in units of log2, because the GPU computes powers of two. A *query row* is one
query head of one token; R rows with G query heads for a KV head are R * G query rows.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.online_softmax import MASKED, Partial
from pallas_kernels.stored_kv import StoredKV

# jax deprecated this backend in 0.11 and says so whenever a kernel is lowered. It stays the one for
# GPUs before Hopper for as long as jax has it; whoever chose it here need not be told each time.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

LOG2_E = math.log2(math.e)
SMALL_TILE = 16  # query rows; the least that tensor cores take

# Warps and stages of the float32 kernels, by name and padded head_dim, where (8, 1) spills. ptxas
# spills a register or two of a kernel that needs few more than 64, 72, 80... of them, to fit one
# more program on an SM, and with each version of JAX a kernel needs a few more or less. With these
# no chunk size and group spills with jax 0.10.2, 0.11.2 or 0.12.0, for sm_90a; after a change,
# `compile-report --backends pallas_triton --variants every` tells, with the oldest and the newest.
_FLOAT32_WARPS_AND_STAGES = {
    ("sequence_first", 32): (4, 1),
    ("chunk_first", 64): (8, 3),
    ("prefill_causal", 128): (8, 2),
}


@dataclass(frozen=True)
class KernelShape:
    """The sizes a kernel is compiled for."""

    attention: AttentionSpec
    dtype: jnp.dtype  # of the pool, and of the factors of every product
    head_dim: int  # D
    chunk_size: int  # C
    num_chunks: int  # N
    query_tile: int  # query rows of a program whose item has more than `SMALL_TILE`
    key_tile: int  # tokens of one step of the loop over keys
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, kernel: str, stored: StoredKV, attention: AttentionSpec) -> KernelShape:
        """The sizes of the kernel of that name."""
        padded_dim = _padded(stored.head_dim)
        sizes = {
            "attention": attention,
            "dtype": stored.dtype,
            "head_dim": stored.head_dim,
            "chunk_size": stored.chunk_size,
            "num_chunks": stored.num_chunks,
        }
        if stored.dtype.itemsize == 4:
            # Full float32 products have no tensor cores: registers bound the tile, not memory.
            key_tile = max(16, min(32, 2048 // padded_dim))
            warps, stages = _FLOAT32_WARPS_AND_STAGES.get((kernel, padded_dim), (8, 1))
            return cls(
                **sizes, query_tile=32, key_tile=key_tile, num_warps=warps, num_stages=stages
            )
        # Keys and values of all stages stay within 96 KiB, so that two programs fit an SM.
        key_tile = min(64, 8192 // padded_dim)
        return cls(**sizes, query_tile=64, key_tile=key_tile, num_warps=4, num_stages=3)

    @property
    def group(self) -> int:
        """Query heads that read one KV head, G."""
        return self.attention.heads.group

    @property
    def padded_dim(self) -> int:
        return _padded(self.head_dim)

    @property
    def compiler_params(self) -> plt.CompilerParams:
        return plt.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


def unsupported(shapes: AttentionShapes) -> str | None:
    """Why no kernel exists for these shapes, or None."""
    if shapes.codec is not None:
        return f"the Triton kernels read chunks stored as they are, not {shapes.codec.name}"
    if shapes.dtype not in ("float32", "bfloat16", "float16"):
        return f"the Triton kernels take float32, bfloat16 and float16, not {shapes.dtype}"
    if not 1 <= shapes.head_dim <= 256:
        return f"the Triton kernels take a head_dim up to 256, not {shapes.head_dim}"
    if shapes.chunk_size not in (16, 32, 64, 128, 256):
        return (
            "the Triton kernels take a chunk_size of 16, 32, 64, 128 or 256, "
            f"not {shapes.chunk_size}"
        )
    if not 1 <= shapes.group <= 64:
        return f"the Triton kernels take up to 64 query heads a KV head, not {shapes.group}"
    return None


@dataclass(frozen=True)
class HeadKVRefs:
    """Keys and values of one KV head of one layer, in a kernel."""

    keys: Any  # the pool's reference [L, Hkv, N, C, D]
    values: Any
    layer: jax.Array
    head: jax.Array


@dataclass(frozen=True)
class Run:
    """Consecutive tokens in the chunks named by `table[*row, begin:]`."""

    table: Any  # a reference
    row: tuple[jax.Array, ...]
    begin: jax.Array | int
    num_tokens: jax.Array


def attend(
    queries: Float[Array, "R Dp"],
    kv: HeadKVRefs,
    run: Run,
    shape: KernelShape,
    last_seen: Int32[Array, " R"] | None = None,
) -> Partial:
    """Attention over the tokens of `run`, in log2 units: Partial [R].

    `last_seen` is the last token of the run that each query sees, None for all; the first token is
    seen by every query that matters.
    """
    rows, tokens = queries.shape[0], shape.key_tile
    dims = jnp.arange(shape.padded_dim, dtype=jnp.int32)
    slot = jnp.arange(tokens, dtype=jnp.int32)
    precision = lax.Precision.HIGHEST if shape.dtype == jnp.float32 else None

    def place(step):
        """Chunk ids and offsets of the tokens of a step, and whether the run has them."""
        if shape.chunk_size >= tokens:
            per_chunk = shape.chunk_size // tokens
            ids = run.table[(*run.row, run.begin + lax.div(step, jnp.int32(per_chunk)))]
            offsets = lax.rem(step, jnp.int32(per_chunk)) * tokens + slot
        else:
            chunk = step * (tokens // shape.chunk_size) + slot // shape.chunk_size
            there = chunk * shape.chunk_size < run.num_tokens
            ids = plt.load(run.table.at[(*run.row, run.begin + chunk)], mask=there, other=0)[
                :, None
            ]
            offsets = slot % shape.chunk_size
        return jnp.clip(ids, 0, shape.num_chunks - 1), offsets

    def load(pool, ids, offsets, there):
        where = pool.at[kv.layer, kv.head, ids, offsets[:, None], dims[None]]
        mask = there[:, None]
        if shape.padded_dim != shape.head_dim:
            mask = mask & (dims < shape.head_dim)[None]
        return plt.load(where, mask=jnp.broadcast_to(mask, (tokens, len(dims))), other=0.0)

    def step(index, state: Partial) -> Partial:
        ids, offsets = place(index)
        there = index * tokens + slot < run.num_tokens
        k = load(kv.keys, ids, offsets, there)
        scores = _scores(plt.dot(queries, k.T, precision=precision), shape.attention)
        visible = there[None]
        if last_seen is not None:
            visible = visible & ((index * tokens + slot)[None] <= last_seen[:, None])
        scores = jnp.where(visible, scores, MASKED)
        maximum = jnp.maximum(state.maximum, scores.max(axis=1))
        keep = jnp.exp2(state.maximum - maximum)
        weights = jnp.exp2(scores - maximum[:, None])
        v = load(kv.values, ids, offsets, there)
        return Partial(
            state.output * keep[:, None] + plt.dot(weights.astype(v.dtype), v, precision=precision),
            maximum,
            state.total * keep + weights.sum(axis=1),
        )

    start = Partial(
        jnp.zeros((rows, shape.padded_dim), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    return lax.fori_loop(0, pl.cdiv(run.num_tokens, tokens), step, start)


def _scores(
    products: Float32[Array, "R tokens"], attention: AttentionSpec
) -> Float32[Array, "R tokens"]:
    """Scores in units of log2; it is those in natural units that a softcap bends."""
    scale, softcap = attention.scale, attention.softcap
    if softcap is None:
        return products * (scale * LOG2_E)
    # Becomes libdevice's tanh, which is off by a unit or two in the last place.
    return jnp.tanh(products * (scale / softcap)) * (softcap * LOG2_E)


def load_queries(
    q: Any,
    row: Int32[Array, " ..."],
    query_head: Int32[Array, " R"],
    inside: Bool[Array, " R"],
    shape: KernelShape,
) -> Float[Array, "R Dp"]:
    """Query rows in the pool's dtype: head `query_head` of row `row` of the batch, which `q` refers
    to; zeros where not `inside`."""
    dims = jnp.arange(shape.padded_dim, dtype=jnp.int32)
    row = jnp.broadcast_to(row, query_head.shape)
    mask = inside[:, None] & (dims < shape.head_dim)[None]
    loaded = plt.load(q.at[row[:, None], query_head[:, None], dims[None]], mask=mask, other=0.0)
    return loaded.astype(shape.dtype)


def _padded(head_dim: int) -> int:
    return max(16, pl.next_power_of_2(head_dim))
