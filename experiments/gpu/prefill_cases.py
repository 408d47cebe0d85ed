"""Prefill calls to check: packed new tokens behind cached prefixes of several sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from experiments.gpu import windowed_cases
from experiments.gpu.clustered_cases import ClusteredChunks
from experiments.gpu.coded_cases import CODECS, CodedPool
from experiments.gpu.oracle import Expected, expected
from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.codecs import IDENTITY
from pallas_kernels.plans import NewTokens, PrefillReads
from pallas_kernels.prefill_attention import PREFILL_ATTENTION
from pallas_kernels.stored_kv import StoredKV
from pallas_kernels.targets import current_target
from pallas_kernels.windows import Window


@dataclass(frozen=True)
class PrefillCase:
    """New tokens at positions [begin, end) of each sequence.

    Attributes:
      shared: chunks that all sequences begin with.
      softcap, scale: as in `prefill_attention`.
      codec: the name of what chunks are encoded by; then each range begins where a chunk does.
      windows: every KV head has one of those of `windowed_cases`.
      clusters: how many query heads form, None where each has its own keys; with some, ranges begin
        as with a codec.
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
    codec: str = IDENTITY
    windows: bool = False
    clusters: int | None = None

    @property
    def attended_heads(self) -> tuple[int, int]:
        """Query heads and KV heads as attention sees them: one for each with clusters."""
        return self.num_heads, self.num_kv_heads if self.clusters is None else self.num_heads

    @property
    def name(self) -> str:
        tokens = ",".join(f"{begin}-{end}" for begin, end in self.ranges)
        heads = f"h{self.num_heads}/{self.num_kv_heads}"
        size = f"d{self.head_dim} c{self.chunk_size} {self.dtype}"
        softcap = f" softcap {self.softcap:g}" if self.softcap is not None else ""
        scale = f" scale {self.scale:g}" if self.scale is not None else ""
        codec = f" {self.codec}" if self.codec != IDENTITY else ""
        windows = " windows" if self.windows else ""
        clusters = f" {self.clusters} clusters" if self.clusters is not None else ""
        kind = f"{softcap}{scale}{codec}{windows}{clusters}"
        return f"prefill {tokens} s{self.shared} {heads} {size}{kind}"


_LONG = ((4096, 4196), (4096, 4097), (4160, 4290), (4096, 4200))

_ALIGNED = ((4096, 4196), (4096, 4097), (4160, 4290), (4352, 4400))

_TINY = PrefillCase(((16, 40), (0, 3)), 32, 4, 2, 16, chunk_size=16, dtype="float32")

TINY = (
    _TINY,
    replace(_TINY, codec="int4"),
    replace(_TINY, windows=True),
    replace(_TINY, clusters=3),
)
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
    PrefillCase(_LONG, 512, 12, 3, 128, shared=64, windows=True),
    PrefillCase(_LONG, 512, 9, 3, 64, chunk_size=16, dtype="float16", shared=200, windows=True),
    PrefillCase(_ALIGNED, 512, 12, 3, 128, shared=64, codec="int8", windows=True),
    *(PrefillCase(_ALIGNED, 512, 8, 2, 128, shared=64, codec=codec) for codec in CODECS),
    PrefillCase(_ALIGNED, 512, 9, 3, 80, chunk_size=16, shared=256, codec="int4"),
    PrefillCase(_ALIGNED, 512, 8, 1, 64, chunk_size=32, dtype="float16", shared=128, codec="int8"),
    PrefillCase(_ALIGNED, 512, 16, 4, 128, shared=64, clusters=6),
    PrefillCase(_ALIGNED, 512, 9, 3, 64, chunk_size=16, dtype="float16", clusters=4),
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
        num_heads=case.attended_heads[0],
        num_kv_heads=case.attended_heads[1],
        head_dim=case.head_dim,
        chunk_size=case.chunk_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
    )
    windows: tuple[Window | None, ...] = ()
    if case.windows:
        windows = windowed_cases.windows_for(max(end for _, end in case.ranges))
    of_heads = windowed_cases.of_heads(case.num_kv_heads, windows) if windows else None
    by_head = None if of_heads is None else [windows[int(window)] for window in of_heads]
    batch = pack_segments(
        segments,
        num_tokens=case.num_tokens,
        chunk_size=case.chunk_size,
        num_chunks=num_chunks,
        options=options,
        windows=windows,
    )

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype))

    q = normal(case.num_tokens, case.num_heads, case.head_dim)
    pool = (2, case.num_kv_heads, num_chunks, case.chunk_size, case.head_dim)
    keys, values = normal(*pool), normal(*pool)

    sizes = *case.attended_heads, case.head_dim
    attention = AttentionSpec.of(*sizes, scale=case.scale, softcap=case.softcap)

    def attend(q, stored, plan, new, of_heads):
        reads = PrefillReads(plan, QUERY_TILE, new, of_heads)
        return PREFILL_ATTENTION.attend(q, stored, reads, attention, implementation="pallas_triton")

    of_token = [(s, position) for s in segments for position in range(s.begin, s.end)]
    longest = max(position for _, position in of_token) + 1
    tables = [segment.chunk_ids for segment, _ in of_token]
    stored, new = StoredKV(jnp.asarray(keys), jnp.asarray(values), jnp.int32(1)), None
    read = keys[1], values[1]
    if case.codec != IDENTITY:
        coded = CodedPool.of(case.codec, keys, values)
        stored, read = coded.stored, (coded.keys, coded.values)
        new = _new_tokens(case, (keys[1], values[1]), of_token)
        tables = [coded.table(segment.chunk_ids, position + 1) for segment, position in of_token]
    if case.clusters is not None:
        how = {"query_heads": case.num_heads, "count": case.clusters, "seed": seed}
        chunks = ClusteredChunks.of(keys, values, [s.chunk_ids for s in segments], **how)
        stored, read = chunks.stored, (chunks.keys[1], chunks.values[1])
        new = _new_tokens(case, read, of_token)

    def expect() -> Expected:
        return expected(
            q[: len(of_token)],
            *read,
            tables,
            [position + 1 for _, position in of_token],
            most=max(16, most_values // (longest * case.head_dim)),
            scale=case.scale,
            softcap=case.softcap,
            windows=by_head,
        )

    arguments = (q, stored, batch.plan, new, of_heads)
    return MadePrefill(attend, arguments, len(of_token), expect)


def _new_tokens(case: PrefillCase, pool, of_token) -> NewTokens:
    """Exact keys and values of the packed tokens, zeros for padding."""
    exact = []
    for chunks in pool:
        tokens = np.zeros((case.num_tokens, len(chunks), case.head_dim), chunks.dtype)
        for index, (segment, position) in enumerate(of_token):
            chunk, offset = divmod(position, case.chunk_size)
            tokens[index] = chunks[:, segment.chunk_ids[chunk], offset]
        exact.append(jnp.asarray(tokens))
    return NewTokens(*exact)


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
