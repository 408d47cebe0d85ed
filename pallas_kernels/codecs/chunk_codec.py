"""What a chunk is stored as: the interface of codecs, and the names that a user gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Float32, Shaped

from pallas_kernels.codecs.affine import AffineCodec
from pallas_kernels.codecs.codebook import CodebookCodec
from pallas_kernels.codecs.context import NO_CONSTANTS, ChunkContext, Constants, HeadConstants
from pallas_kernels.codecs.scaled_float import ScaledFloatCodec


class CodecError(ValueError):
    """A codec that there is none of, or that cannot store what is asked of it."""


@runtime_checkable
class TensorCodec(Protocol):
    """How the keys of a chunk are stored, or its values; hashable, since programs depend on it.

    Letters: C tokens of a chunk, D numbers of a head.
    """

    def problem(self, chunk_size: int, head_dim: int) -> str | None:
        """Why chunks of these sizes cannot be stored, in words; None if they can."""
        ...

    def arrays(self, chunk_size: int, head_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of what is stored of one chunk of one head."""
        ...

    def encode(
        self, numbers: Float[Array, "*chunks C D"], context: ChunkContext | None = None
    ) -> dict[str, Shaped[Array, "*_"]]:
        """What is stored of each chunk. All of it decodes to finite numbers, whatever came in: an
        infinity left in a chunk would reach whoever reads it.

        What is in `context` beside the numbers, the codec may use; the pool gives it.
        """
        ...

    def decode(
        self, stored: dict[str, Shaped[Array, "*_"]], constants: Constants | None = None
    ) -> Float32[Array, "*chunks C D"]:
        """The numbers of each chunk, in the order of their tokens."""
        ...


@dataclass(frozen=True)
class ChunkCodec:
    """How a full chunk is stored.

    Attributes:
      name: in results, statistics and messages.
      constants: what the codecs of keys and values were calibrated to, if they were.
    """

    name: str
    keys: TensorCodec
    values: TensorCodec
    constants: HeadConstants = field(default=NO_CONSTANTS)

    def head_bytes(self, chunk_size: int, head_dim: int) -> int:
        """Bytes that the keys and values of one chunk of one head take."""
        return sum(part_bytes(part, chunk_size, head_dim) for part in (self.keys, self.values))

    def check(self, chunk_size: int, head_dim: int, heads: tuple[int, int] | None = None) -> None:
        """Raises CodecError when chunks of these sizes cannot be stored; with `heads`, the layers
        and KV heads of a model, when it was calibrated to others."""
        made_for = self.constants.heads
        if heads is not None and made_for is not None and made_for != heads:
            raise CodecError(
                f"codec {self.name!r} was calibrated for another model: of {made_for[0]} layers of "
                f"{made_for[1]} KV heads, and this one has {heads[0]} of {heads[1]}"
            )
        known = self.constants
        for what, codec, constants in (
            ("keys", self.keys, known.keys),
            ("values", self.values, known.values),
        ):
            problem = codec.problem(chunk_size, head_dim)
            if problem is None and isinstance(codec, CodebookCodec):
                problem = codec.lacking(constants, head_dim)
            if problem is not None:
                raise CodecError(f"codec {self.name!r} cannot store {what}: {problem}")


def part_bytes(part: TensorCodec, chunk_size: int, head_dim: int) -> int:
    """Bytes that the keys of one chunk of one head take, or its values."""
    arrays = part.arrays(chunk_size, head_dim).values()
    return sum(array.size * array.dtype.itemsize for array in arrays)


def codes_per_byte(codec: TensorCodec) -> int:
    """Tokens that have a code in each byte."""
    return codec.per_byte if isinstance(codec, AffineCodec) else 1


IDENTITY = "identity"


def codec_of(name: str, *, group: int | None = None) -> ChunkCodec | None:
    """The codec of a name; None where chunks are stored as they are.

    Args:
      name: "identity" for none; "int8", "int4" or "int2" for KIVI's codes, or two of these for keys
        and values, as in "int4/int2"; "fp8" (e4m3) or "fp8_e5m2". Keys of 2 bits are no use to a
        small model: SmolLM2-135M's perplexity rises by 65%, with "int4/int2" by 4%.
      group: numbers that share a scale, in KIVI's codes; None for 64, or what divides it.

    Raises:
      CodecError: for another name.
      ValueError: for a group below 2.
    """
    if name == IDENTITY:
        return None
    floats = _FLOATS.get(name)
    if floats is not None:
        return ChunkCodec(name, ScaledFloatCodec(floats), ScaledFloatCodec(floats))
    parts = name.split("/")
    if len(parts) > 2 or not _BITS.keys() >= set(parts):
        known = ", ".join([IDENTITY, *_BITS, "int4/int2", *_FLOATS])
        raise CodecError(f"unknown codec {name!r}; known: {known}")
    bits = _BITS[parts[0]], _BITS[parts[-1]]
    full_name = name if group is None else f"{name} groups of {group}"
    return ChunkCodec(
        full_name,
        keys=AffineCodec(bits[0], "tokens", group, fine_first=bits[0] == 4),
        values=AffineCodec(bits[1], "channels", group, fine_first=bits[0] > bits[1]),
    )


_BITS = {"int8": 8, "int4": 4, "int2": 2}
_FLOATS = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
