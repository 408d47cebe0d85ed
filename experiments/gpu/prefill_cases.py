"""Prefill calls to check: packed new tokens behind cached prefixes of several sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from experiments.gpu.oracle import Expected, expected
from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from pallas_kernels import prefill_attention
from pallas_kernels.targets import current_target


@dataclass(frozen=True)
class PrefillCase:
    """New tokens at positions [begin, end) of each sequence.

    Attributes:
      shared: chunks that all sequences begin with.
      softcap, scale: as in `prefill_attention`.
    """

    ranges: tuple[tuple[int, int], ...]
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int = 64
    dtype: str = "bfloat16"
    shared: int = 0
    softcap: float | None = None
    scale: float | None = None

    @property
    def name(self) -> str:
        tokens = ",".join(f"{begin}-{end}" for begin, end in self.ranges)
        heads = f"h{self.num_heads}/{self.num_kv_heads}"
        size = f"d{self.head_dim} c{self.chunk_size} {self.dtype}"
        softcap = f" softcap {self.softcap:g}" if self.softcap is not None else ""
        scale = f" scale {self.scale:g}" if self.scale is not None else ""
        return f"prefill {tokens} s{self.shared} {heads} {size}{softcap}{scale}"


_LONG = ((4096, 4196), (4096, 4097), (4160, 4290), (4096, 4200))

TINY = (PrefillCase(((16, 26), (0, 3)), 32, 4, 2, 16, chunk_size=16, dtype="float32"),)
ALL = (
    *TINY,
    PrefillCase(((0, 512),), 512, 8, 2, 128),
    PrefillCase(_LONG, 512, 8, 2, 128, shared=64),
    PrefillCase(_LONG, 512, 16, 1, 64, chunk_size=16, shared=256),
    PrefillCase(_LONG, 512, 9, 3, 64, chunk_size=128, dtype="float32", shared=32),
    PrefillCase(_LONG, 512, 4, 4, 256, chunk_size=32, dtype="float16", shared=128),
    PrefillCase(((20000, 20128),), 128, 8, 1, 80, chunk_size=64),
    PrefillCase(((64, 129), (0, 3), (640, 699), (15, 16)), 128, 6, 2, 32, chunk_size=16),
    PrefillCase(_LONG, 512, 8, 4, 256, shared=64, softcap=5.0, scale=0.25),
)


@dataclass(frozen=True)
class MadePrefill:
    """A call: `function(*arguments)` -> [T, Hq, D], of which `tokens` count."""

    function: Callable
    arguments: tuple
    tokens: int
    expect: Callable[[], Expected]


def cases(small: bool) -> tuple[PrefillCase, ...]:
    return TINY if small else ALL


def make(case: PrefillCase, seed: int, *, most_values: int) -> MadePrefill:
    """Random operands of a case, in the second layer of two."""
    random = np.random.default_rng(seed)
    segments, num_chunks = _segments(case, random)
    options = PlannerOptions.for_gpu(
        num_sms=current_target().num_sms,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        chunk_size=case.chunk_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
    )
    batch = pack_segments(
        segments,
        num_tokens=case.num_tokens,
        chunk_size=case.chunk_size,
        num_chunks=num_chunks,
        options=options,
    )

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype))

    q = normal(case.num_tokens, case.num_heads, case.head_dim)
    pool = (2, case.num_kv_heads, num_chunks, case.chunk_size, case.head_dim)
    keys, values = normal(*pool), normal(*pool)

    def attend(q, keys, values, plan, layer):
        return prefill_attention(
            q,
            keys,
            values,
            plan,
            query_tile=QUERY_TILE,
            layer=layer,
            scale=case.scale,
            softcap=case.softcap,
            implementation="pallas_triton",
        )

    of_token = [(s, position) for s in segments for position in range(s.begin, s.end)]
    longest = max(position for _, position in of_token) + 1

    def expect() -> Expected:
        return expected(
            q[: len(of_token)],
            keys[1],
            values[1],
            [segment.chunk_ids for segment, _ in of_token],
            [position + 1 for _, position in of_token],
            most=max(16, most_values // (longest * case.head_dim)),
            scale=case.scale,
            softcap=case.softcap,
        )

    arguments = (q, keys, values, batch.plan, np.int32(1))
    return MadePrefill(attend, arguments, len(of_token), expect)


def _segments(case: PrefillCase, random) -> tuple[list[Segment], int]:
    counts = [-(-end // case.chunk_size) - case.shared for _, end in case.ranges]
    num_chunks = case.shared + sum(counts) + 2
    ids = random.permutation(num_chunks).tolist()
    common, own = ids[: case.shared], ids[case.shared :]
    segments = []
    for (begin, end), count in zip(case.ranges, counts, strict=True):
        table, own = common + own[:count], own[count:]
        segments.append(Segment([7] * (end - begin), table, begin, end, begin))
    return segments, num_chunks
