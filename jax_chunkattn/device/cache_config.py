"""How large the pool is, and what its chunks are stored as."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax.numpy as jnp

from jax_chunkattn.device.model_interface import CacheSpec
from pallas_kernels.codecs import IDENTITY, ChunkCodec, codec_of


@dataclass(frozen=True)
class CacheConfig:
    """Size and type of the pool.

    Attributes:
      num_chunks: chunks in the pool, N; None takes as many as fit into `memory`.
      chunk_size: tokens a chunk holds, C.
      dtype: of keys and values. Prefer float32 on CPU, where jaxlib 0.10.2 converts a bfloat16
        pool as a whole at every write.
      memory: of the pool, in bytes or as text with a unit: "2GiB", "500 MB". Instead of
        `num_chunks`, not beside it.
      codec: what full chunks are encoded by: a name such as "int4" (see `pallas_kernels.codecs`),
        "identity" for none, or a codec itself, such as `models.calibration.load_codec` reads. Then
        `dtype` is of the rows' last chunks, which are exact: one for each row that an engine may
        run.

    Raises:
      ValueError: for sizes below 1, a memory that cannot be read, a dtype that is not a float, or a
        codec that is not known.
    """

    num_chunks: int | None = None
    chunk_size: int = 64
    dtype: str = "float32"
    memory: int | str | None = None
    codec: str | ChunkCodec = IDENTITY

    def __post_init__(self):
        if (self.num_chunks is None) == (self.memory is None):
            raise ValueError("a pool needs num_chunks or memory, and not both")
        if self.memory is not None:
            parse_bytes(self.memory)
        for name in ("num_chunks", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float16 for a KV pool, got {self.dtype!r}"
            )
        _ = self.chunk_codec

    @property
    def chunk_codec(self) -> ChunkCodec | None:
        """What full chunks are encoded by, if they are."""
        return codec_of(self.codec) if isinstance(self.codec, str) else self.codec

    @property
    def codec_name(self) -> str:
        """Of the codec, "identity" where chunks are stored as they are."""
        codec = self.chunk_codec
        return codec.name if codec is not None else IDENTITY

    def chunks_for(self, spec: CacheSpec, num_slots: int = 0) -> int:
        """Chunks in the pool of a model, N: those asked for, or those that fit into `memory`, with
        a codec beside the exact last chunks of `num_slots` rows.

        Raises:
          ValueError: when not even one fits, or the codec cannot store the model's.
        """
        bytes_per_chunk = self.bytes_per_chunk(spec)
        if self.num_chunks is not None:
            return self.num_chunks
        assert self.memory is not None, "checked when made"
        tails = num_slots * self.exact_bytes(spec) if self.chunk_codec is not None else 0
        num_chunks = (parse_bytes(self.memory) - tails) // bytes_per_chunk
        if num_chunks < 1:
            beside = f" beside {tails:,} for the last chunks of {num_slots} rows" if tails else ""
            raise ValueError(
                f"a chunk takes {bytes_per_chunk:,} bytes{beside}, memory is {self.memory}"
            )
        return num_chunks

    def bytes_per_chunk(self, spec: CacheSpec) -> int:
        """Bytes that one full chunk's keys and values take over all layers.

        Raises:
          CodecError: when the codec cannot store the model's.
        """
        codec = self.chunk_codec
        if codec is None:
            return self.exact_bytes(spec)
        codec.check(self.chunk_size, spec.head_dim, (spec.num_layers, spec.num_kv_heads))
        of_head = codec.head_bytes(self.chunk_size, spec.head_dim)
        return of_head * spec.num_layers * spec.num_kv_heads

    def exact_bytes(self, spec: CacheSpec) -> int:
        """Bytes that a chunk takes as it is: of each row's last one, with a codec."""
        return spec.values_per_token * self.chunk_size * jnp.dtype(self.dtype).itemsize


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as 1000, "500 MB" (decimal) or "2GiB" (binary).

    Raises:
      ValueError: for anything else, or less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", str(size).strip())
    if match is None:
        raise ValueError(f"a size is a number of bytes or such as '500MB' or '2GiB', got {size!r}")
    number, prefix, binary = match.groups()
    exponent = " KMGT".index(prefix or " ")
    count = int(float(number) * (1024 if binary else 1000) ** exponent)
    if count < 1:
        raise ValueError(f"a size must be at least a byte, got {size!r}")
    return count
