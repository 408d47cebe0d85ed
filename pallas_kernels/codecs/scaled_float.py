"""8-bit floats with a scale for each chunk of each head: the plain choice where GPUs have them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped


@dataclass(frozen=True)
class ScaledFloatCodec:
    """Floats of a small `dtype`, scaled so that the chunk's largest is the largest that it has.

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
            "codes": jax.ShapeDtypeStruct((chunk_size, head_dim), self.dtype),
            "scale": jax.ShapeDtypeStruct((1, 1), jnp.float32),
        }

    def encode(self, numbers: Float[Array, "*chunks C D"]) -> dict[str, Shaped[Array, "*_"]]:
        """The arrays of each chunk; NaN is stored as 0, infinities as the largest float32."""
        finite = jnp.nan_to_num(numbers.astype(jnp.float32))
        most = float(jnp.finfo(self.dtype).max)
        largest = jnp.abs(finite).max(axis=(-2, -1), keepdims=True)
        # Divided first: what is left of a division by the smallest scale would overflow.
        scale = jnp.maximum(largest / most, float(jnp.finfo(jnp.float32).tiny))
        return {"codes": jnp.clip(finite / scale, -most, most).astype(self.dtype), "scale": scale}

    def decode(self, stored: dict[str, Shaped[Array, "*_"]]) -> Float32[Array, "*chunks C D"]:
        """The numbers of each chunk."""
        return stored["codes"].astype(jnp.float32) * stored["scale"]
