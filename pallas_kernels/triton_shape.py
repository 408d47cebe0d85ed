"""The sizes that a Triton kernel is compiled for, and those that there is none for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.clusters import ClusteredKV
from pallas_kernels.codecs import AffineCodec, ChunkCodec, ScaledFloatCodec, codes_per_byte
from pallas_kernels.coded_kv import CodedKV, LayerKV
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.targets import current_target

# jax deprecated this backend in 0.11 and says so whenever a kernel is lowered. It stays the one for
# GPUs before Hopper for as long as jax has it; whoever chose it here need not be told each time.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

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
_FLOAT32_OF_CLUSTERS = {("sequence_first", 32): (4, 2)}  # where those of others spill


@dataclass(frozen=True)
class KernelShape:
    """The sizes a kernel is compiled for."""

    attention: AttentionSpec
    dtype: jnp.dtype  # of the factors of every product
    head_dim: int  # D
    chunk_size: int  # C
    num_chunks: int  # N
    query_tile: int  # query rows of a program whose item has more than `SMALL_TILE`
    key_tile: int  # tokens of a tile; a step of the loop over keys has one of each part
    num_warps: int
    num_stages: int
    codec: ChunkCodec | None = None
    parts: int = 1  # equal ones that a chunk's tokens are divided into

    @classmethod
    def of(
        cls, kernel: str, dtype: DTypeLike | None, stored: LayerKV, attention: AttentionSpec
    ) -> KernelShape:
        """The sizes of the kernel of that name, which multiplies numbers of `dtype`; None for that
        of what is stored.

        Raises:
          ValueError: for bytes that the kernel cannot address.
        """
        _check_addressable(stored)
        dtype = jnp.dtype(stored.dtype if dtype is None else dtype)
        padded_dim = _padded(stored.head_dim)
        parts = _parts(stored.codec)
        sizes = {
            "attention": attention,
            "dtype": dtype,
            "head_dim": stored.head_dim,
            "chunk_size": stored.chunk_size,
            "num_chunks": stored.num_chunks,
            "codec": stored.codec,
            "parts": parts,
        }
        if dtype.itemsize == 4:
            # Full float32 products have no tensor cores: registers bound the tile, not memory.
            key_tile = max(16, min(32, 2048 // padded_dim) // parts)
            known = _FLOAT32_WARPS_AND_STAGES
            if isinstance(stored, ClusteredKV):
                known = known | _FLOAT32_OF_CLUSTERS
            warps, stages = known.get((kernel, padded_dim), (8, 1))
            return cls(
                **sizes, query_tile=32, key_tile=key_tile, num_warps=warps, num_stages=stages
            )
        # Keys and values of all stages stay within 96 KiB, so that two programs fit an SM.
        key_tile = max(16, min(64, 8192 // padded_dim) // parts)
        query_tile = 32 if stored.codec is not None and _is_tight(padded_dim) else 64
        return cls(**sizes, query_tile=query_tile, key_tile=key_tile, num_warps=4, num_stages=3)

    def exact(self, num_chunks: int) -> KernelShape:
        """For chunks of a smaller pool, stored as they are."""
        return replace(self, num_chunks=num_chunks, codec=None, parts=1)

    @property
    def part_tokens(self) -> int:
        """Tokens of a part of a chunk."""
        return self.chunk_size // self.parts

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
    if shapes.codec is not None and shapes.clustered:
        return "the Triton kernels read no codes of clustered heads"
    return None if shapes.codec is None else _unreadable(shapes.codec, shapes.head_dim)


def _is_tight(padded_dim: int) -> bool:
    """Whether decoded chunks and 64 query rows do not fit registers: where the product reads both
    from there, as before Hopper, and where a head has more than 128 numbers."""
    capability = current_target().compute_capability
    return padded_dim > 128 or (capability is not None and capability < (9, 0))


def _unreadable(codec: ChunkCodec, head_dim: int) -> str | None:
    """Why the kernels cannot read what a codec stores, or None."""
    for what, tensor in (("keys", codec.keys), ("values", codec.values)):
        if not isinstance(tensor, AffineCodec | ScaledFloatCodec):
            return (
                "the Triton kernels read chunks stored as they are, as small integers with scales "
                f"or as scaled floats, not the {what} of {codec.name!r}"
            )
        if isinstance(tensor, AffineCodec) and tensor.along == "channels":
            group = tensor.group_of(head_dim)
            if group & (group - 1):
                return f"the Triton kernels take groups of 2, 4, 8... channels, not {group}"
    return None


def _check_addressable(stored: LayerKV) -> None:
    """Pallas counts in 32 bits, signed, up to arrays of 4 GiB: enough for numbers of two bytes."""
    arrays = []
    if isinstance(stored, CodedKV):
        arrays = [*stored.keys.items(), *stored.values.items()]
    if isinstance(stored, ClusteredKV):
        arrays = [("head_slots", stored.head_slots)]
    for name, array in arrays:
        if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
            raise ValueError(
                f"the Triton kernels cannot address {name!r} of 2 to 4 GiB in the pool, and it has "
                f"{array.size} bytes: make the pool smaller, or so large that it has more"
            )


def _parts(codec: ChunkCodec | None) -> int:
    """Parts of a chunk of which no byte has codes of two tokens, of keys nor of values."""
    if codec is None:
        return 1
    return max(codes_per_byte(codec.keys), codes_per_byte(codec.values))


def _padded(head_dim: int) -> int:
    return max(16, pl.next_power_of_2(head_dim))
