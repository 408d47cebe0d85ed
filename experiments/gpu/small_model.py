"""A small random decoder with heads that the GPU kernels take, for tokens and command buffers."""

from __future__ import annotations

from models.config import DecoderConfig

MEASURED = DecoderConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_positions=4096,
)
TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_positions=256,
)


def config(small: bool) -> DecoderConfig:
    return TINY if small else MEASURED


def make(small: bool, dtype: str, seed: int):
    """The model on the default device, as `models.load` makes it there."""
    from models.building import build
    from models.random_weights import random_fill
    from pallas_kernels.targets import current_target

    shape = config(small)
    unroll = current_target().platform == "gpu"
    return build(shape, dtype, random_fill(shape, seed), unroll=unroll)
