"""8-bit floats with a scale for each chunk of each head: the plain choice where GPUs have them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from pallas_kernels.codecs.context import ChunkContext, Constants


@dataclass(frozen=True)
class ScaledFloatCodec:
    """Floats of a small `dtype`, scaled so that the chunk's largest is the largest that it has.

    They are stored as bytes: XLA on a CPU converts arrays of them as a whole to read some or write
    some.

    Attributes:
      dtype: "float8_e4m3fn", with 3 bits behind the point, or "float8_e5m2", with 2 (formats of
        arXiv 2209.05433).

    Raises:
      ValueError: for another dtype.
    """

    dtype: str

    def __post_init__(self):
        if self.dtype not in ("float8_e4m3fn", "float8_e5m2"):
            raise ValueError(f"the dtype is float8_e4m3fn or float8_e5m2, not {self.dtype}")

    def problem(self, chunk_size: int, head_dim: int) -> str | None:
        """Why chunks of these sizes cannot be stored: there is no reason."""
        return None

    def arrays(self, chunk_size: int, head_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What is stored of one chunk of one head."""
        return {
            "codes": jax.ShapeDtypeStruct((chunk_size, head_dim), jnp.uint8),
            "scale": jax.ShapeDtypeStruct((1, 1), jnp.float32),
        }

    def encode(
        self, numbers: Float[Array, "*chunks C D"], context: ChunkContext | None = None
    ) -> dict[str, Shaped[Array, "*_"]]:
        """The arrays of each chunk; NaN is stored as 0, infinities as the largest float32."""
        finite = jnp.nan_to_num(numbers.astype(jnp.float32))
        most = float(jnp.finfo(self.dtype).max)
        largest = jnp.abs(finite).max(axis=(-2, -1), keepdims=True)
        # Divided first: what is left of a division by the smallest scale would overflow.
        scale = jnp.maximum(largest / most, float(jnp.finfo(jnp.float32).tiny))
        codes = jnp.clip(finite / scale, -most, most).astype(self.dtype)
        return {"codes": lax.bitcast_convert_type(codes, jnp.uint8), "scale": scale}

    def decode(
        self, stored: dict[str, Shaped[Array, "*_"]], constants: Constants | None = None
    ) -> Float32[Array, "*chunks C D"]:
        """The numbers of each chunk."""
        return widen(stored["codes"], self.dtype) * stored["scale"]


def widen(codes: UInt8[Array, "*shape"], dtype: str) -> Float32[Array, "*shape"]:
    """Finite 8-bit floats of `dtype`, given as bytes, in float32: exactly.

    Its bits are moved to where float32 has them. XLA's own conversion makes attention over chunks
    of them take three times as long on a CPU, where it is not vectorised.
    """
    info = jnp.finfo(dtype)
    bits = codes.astype(jnp.int32)
    magnitude, smallest = bits & 0x7F, 2.0 ** (info.minexp - 1)
    moved = (magnitude << (23 - info.nmant)) + ((info.minexp + 126) << 23)
    number = lax.bitcast_convert_type(moved, jnp.float32)
    # Where the exponent is 0 there is no leading 1.
    number = jnp.where(magnitude >> info.nmant == 0, (number - smallest) * 2, number)
    return jnp.where(bits > 0x7F, -number, number)
