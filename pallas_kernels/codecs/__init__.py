"""How a full chunk's keys and values are stored: a codec for each, and their names."""

from __future__ import annotations

from pallas_kernels.codecs.affine import AffineCodec
from pallas_kernels.codecs.chunk_codec import (
    IDENTITY,
    ChunkCodec,
    CodecError,
    TensorCodec,
    codec_of,
    codes_per_byte,
    part_bytes,
)
from pallas_kernels.codecs.codebook import CodebookCodec
from pallas_kernels.codecs.context import (
    NO_CONSTANTS,
    ChunkContext,
    Constants,
    HeadConstants,
    spread,
)
from pallas_kernels.codecs.scaled_float import ScaledFloatCodec

__all__ = [
    "IDENTITY",
    "NO_CONSTANTS",
    "AffineCodec",
    "ChunkCodec",
    "ChunkContext",
    "CodebookCodec",
    "CodecError",
    "Constants",
    "HeadConstants",
    "ScaledFloatCodec",
    "TensorCodec",
    "codec_of",
    "codes_per_byte",
    "part_bytes",
    "spread",
]
