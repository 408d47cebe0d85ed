"""Rotary position embedding: how fast each pair of dimensions rotates, and the rotation.

Su et al., arXiv 2104.09864, in the "rotate half" layout of Hugging Face checkpoints: dimension i
rotates with dimension i + R/2, of the R that rotate. Scalings stretch the positions a model was
trained for; they change the frequencies once, so a cached key never has to be rotated again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rotation import rotate_pairs


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def scale(self, frequencies: np.ndarray, rope: Rope) -> tuple[np.ndarray, float]:
        return frequencies / np.float32(self.factor), 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: low frequencies divided by `factor`, high ones kept, and a ramp between.

    Low and high are measured in turns within the original context: The Llama 3 Herd of Models,
    arXiv 2407.21783, section 3.4.2, as its checkpoints describe it.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def scale(self, frequencies: np.ndarray, rope: Rope) -> tuple[np.ndarray, float]:
        turns = self.original_positions * frequencies / np.float32(2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / np.float32(width), 0, 1)
        return frequencies * (kept + (1 - kept) / np.float32(self.factor)), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3): a ramp over dimensions, and a warmer softmax.

    `attention_factor` multiplies queries and keys; None is the paper's 0.1 ln(factor) + 1.
    `truncate` rounds the ends of the ramp to whole dimensions.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def scale(self, frequencies: np.ndarray, rope: Rope) -> tuple[np.ndarray, float]:
        pairs = len(frequencies)
        low, high = (
            self._pair_turning(self.beta_fast, rope, pairs),
            self._pair_turning(self.beta_slow, rope, pairs),
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        width = high - low or 0.001
        stretched = np.clip((np.arange(pairs, dtype=np.float32) - low) / np.float32(width), 0, 1)
        scaled = frequencies / np.float32(self.factor) * stretched + frequencies * (1 - stretched)
        if self.attention_factor is not None:
            return scaled, self.attention_factor
        return scaled, yarn_attention_factor(self.factor)

    def _pair_turning(self, turns: float, rope: Rope, pairs: int) -> float:
        """Which pair turns so many times within the original context."""
        wavelength = self.original_positions / (turns * 2 * math.pi)
        return pairs * math.log(wavelength) / math.log(rope.theta)


@dataclass(frozen=True)
class FactorScaling:
    """Each frequency divided by a factor of its own: LongRoPE (arXiv 2402.13753) and GGUF files."""

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def scale(self, frequencies: np.ndarray, rope: Rope) -> tuple[np.ndarray, float]:
        factors = np.asarray(self.factors, np.float32)
        if factors.shape != frequencies.shape:
            raise ValueError(f"{len(factors)} rope factors for {len(frequencies)} frequencies")
        return frequencies / factors, self.attention_factor


Scaling = LinearScaling | Llama3Scaling | YarnScaling | FactorScaling


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """0.1 `weight` ln(`factor`) + 1: what YaRN multiplies queries and keys by."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer.

    Attributes:
      theta: the base: pair i of R/2 turns by `theta ** (-2 i / R)` radians a token.
      dims: R, how many dimensions of a head turn, its first ones; None is all.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None
    dims: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise ValueError(f"theta must be positive, got {self.theta}")
        if self.dims is not None and (self.dims < 2 or self.dims % 2):
            raise ValueError(f"an even number of dimensions turns, got {self.dims}")

    def turning(self, head_dim: int) -> int:
        """R, the number of dimensions that rotate, for heads of D = `head_dim`."""
        return head_dim if self.dims is None else self.dims

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians a token `[R/2]`, and what cos and sin are multiplied by.

        In float32 throughout, as the checkpoints were trained: at position 8,000 another rounding
        would give other angles.
        """
        dims = self.turning(head_dim)
        exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
        frequencies = np.float32(1.0) / np.float32(self.theta) ** exponents
        if self.scaling is None:
            return frequencies, 1.0
        scaled, factor = self.scaling.scale(frequencies, self)
        return scaled.astype(np.float32), factor


LayerRopes = tuple["Rope | None", ...]


@dataclass(frozen=True)
class RotaryTables:
    """The rotations of all layers of a decoder; layers that rotate alike are one kind.

    Letters: K kinds of layers, R dimensions that rotate.
    """

    kind: tuple[int, ...]  # of each layer
    frequencies: np.ndarray  # [K, R/2] float32
    factors: np.ndarray  # [K] float32

    @classmethod
    def of(cls, ropes: LayerRopes, head_dim: int) -> RotaryTables | None:
        """None when no layer rotates.

        Raises:
          ValueError: when layers rotate different numbers of dimensions.
        """
        kinds = list(dict.fromkeys(ropes))
        sizes = {rope.turning(head_dim) for rope in kinds if rope is not None}
        if not sizes:
            return None
        if len(sizes) > 1:
            raise ValueError(f"layers rotate different numbers of dimensions: {sorted(sizes)}")
        still = np.zeros(sizes.pop() // 2, np.float32), 1.0  # an angle of 0 does not rotate
        rows = [still if rope is None else rope.frequencies(head_dim) for rope in kinds]
        frequencies, factors = zip(*rows, strict=True)
        kind = tuple(kinds.index(rope) for rope in ropes)
        return cls(kind, np.stack(frequencies), np.array(factors, np.float32))

    def angles(self, positions: jax.Array) -> Angles:
        """cos and sin, each `[K, T, 1, R/2]` float32, at `positions [T]`."""
        angles = positions.astype(jnp.float32)[None, :, None] * self.frequencies[:, None, :]
        factors = self.factors[:, None, None]
        return (jnp.cos(angles) * factors)[:, :, None], (jnp.sin(angles) * factors)[:, :, None]


Angles = tuple[jax.Array, jax.Array]


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotate each pair `(i, i + R/2)` of `x [T, H, D]` by its angle; computed in float32.

    `angles` are cos and sin, each `[T, 1, R/2]`. Dimensions from R on are unchanged.
    """
    return rotate_pairs(x, *angles)
