"""The shape of a Llama-architecture decoder, and named shapes."""

from __future__ import annotations

import dataclasses
import difflib

from jax_chunkattn.model_interface import CacheSpec


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """All of a decoder but its weights and their dtype; hashable, so it can be a static argument.

    `num_heads` is Hq, `num_kv_heads` Hkv, `head_dim` D, `num_layers` L, `hidden_size` E. Raises
    ValueError when a field, or the relation of two, makes no decoder.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "tie_embeddings" and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): each KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")

    @property
    def query_size(self) -> int:
        """Hq * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Hkv * D."""
        return self.num_kv_heads * self.head_dim

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec(self.num_layers, self.num_kv_heads, self.head_dim, self.num_heads)

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        hidden = self.hidden_size
        attention = hidden * (2 * self.query_size + 2 * self.kv_size)
        block = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * hidden
        return self.num_layers * block + embeddings + hidden


PRESETS: dict[str, DecoderConfig] = {
    "llama-3-8b": DecoderConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        max_positions=8192,
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        max_positions=8192,
        tie_embeddings=True,
    ),
    "tiny": DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=1024,
        tie_embeddings=True,
    ),
}


def preset(name: str) -> DecoderConfig:
    """The config called `name`; an unknown name is a ValueError that lists the known ones."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown preset {name!r}{hint}; known presets: {', '.join(sorted(PRESETS))}")
