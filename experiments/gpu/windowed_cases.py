"""Cases of heads with windows to check: every head of a layer has another one."""

from __future__ import annotations

import numpy as np

from pallas_kernels.specs import AttentionCase
from pallas_kernels.windows import Window

WINDOWS: tuple[Window | None, ...] = (None, Window(700), Window(300, sinks=100))
SMALL_WINDOWS: tuple[Window | None, ...] = (Window(40), Window(9, sinks=20))
TINY = (AttentionCase("1,3_64,8", 6, 2, 32, chunk_size=16),)
ALL = (
    *TINY,
    AttentionCase("1,32_4096,40", 24, 6, 128, dtype="bfloat16", ragged=200),
    AttentionCase("1,17_3000,40", 9, 3, 64, chunk_size=16, dtype="float16", ragged=900),
    AttentionCase("1,12_2000,9", 8, 4, 256, dtype="bfloat16", ragged=70, softcap=5.0, scale=0.25),
    AttentionCase("1,4,16_1024,640,50", 6, 3, 64, chunk_size=32, ragged=300),
)
"""Decode problems."""


def cases(small: bool) -> tuple[AttentionCase, ...]:
    return TINY if small else ALL


def windows_for(tokens: int) -> tuple[Window | None, ...]:
    """Some that are shorter than so many tokens."""
    return WINDOWS if tokens > 1000 else SMALL_WINDOWS


def of_heads(kv_heads: int, windows: tuple[Window | None, ...]) -> np.ndarray:
    """The window of each KV head: one after another, and again."""
    return np.arange(kv_heads, dtype=np.int32) % len(windows)


def name(case: AttentionCase) -> str:
    return f"{case.name} windows"
