"""Two-phase attention as two Mosaic GPU kernels, for Hopper.

Chunk-first: `mosaic_chunk_first`; sequence-first: `mosaic_sequence_first`; what both do with a run
of chunks: `mosaic_tiles`, and with encoded ones: `mosaic_codes`. Between the two, float32 partials
pass through memory.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.mosaic_chunk_first import chunk_first
from pallas_kernels.chunk_attention.mosaic_codes import unsupported_codec
from pallas_kernels.chunk_attention.mosaic_sequence_first import MAX_GROUP, sequence_first
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.implementations import AttentionShapes, exact_dtype
from pallas_kernels.plans import DecodeReads, require_own, require_partials

__all__ = ["chunk_attention", "chunk_first", "sequence_first", "unsupported"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)
CHUNK_SIZES = (16, 32)  # and multiples of 64


def unsupported(shapes: AttentionShapes) -> str | None:
    """Why these shapes cannot run here, or None."""
    if shapes.clustered:
        return (
            "the Mosaic GPU kernels copy chunks by one id for keys and values, and keys of "
            "clustered heads have their own"
        )
    if shapes.dtype not in DTYPES:
        return f"the Mosaic GPU kernels take bfloat16 and float16, not {shapes.dtype}"
    if shapes.head_dim not in HEAD_DIMS:
        return f"the Mosaic GPU kernels take a head_dim of 64, 128 or 256, not {shapes.head_dim}"
    if shapes.chunk_size not in CHUNK_SIZES and (shapes.chunk_size % 64 or not shapes.chunk_size):
        return (
            "the Mosaic GPU kernels take a chunk_size of 16, 32 or a multiple of 64, "
            f"not {shapes.chunk_size}"
        )
    if shapes.group > MAX_GROUP:
        return (
            f"the Mosaic GPU kernels take up to {MAX_GROUP} query heads a KV head, "
            f"not {shapes.group}"
        )
    if shapes.chosen and shapes.chunk_size % 64:
        return (
            "the Mosaic GPU kernels take a chunk_size that is a multiple of 64 where rows choose "
            f"chunks, not {shapes.chunk_size}"
        )
    if shapes.codec is not None:
        return unsupported_codec(shapes.codec, shapes.chunk_size, shapes.head_dim)
    return None


def chunk_attention(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    reads: DecodeReads,
    attention: AttentionSpec,
    *,
    query_tile: int = 64,
    interpret: Any = False,
) -> Float[Array, "B Hq D"]:
    """See `pallas_kernels.chunk_attention.api.chunk_attention`; the plan must have partials.

    `interpret` is False, True, or `InterpretGPUParams`.
    """
    items, partials = reads.plan.items, require_partials(reads.plan)
    if stored.codec is not None:
        require_own(reads)
    how = {"dtype": exact_dtype(stored, reads), "interpret": interpret}
    shared = chunk_first(
        q, stored, items, partials, attention, reads.head_windows, query_tile=query_tile, **how
    )
    return sequence_first(q, stored, reads, attention, shared, **how)
