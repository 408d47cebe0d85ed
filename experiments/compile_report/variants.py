"""The Pallas kernels to compile one by one: backends, dtypes, head sizes, chunk sizes, groups."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compile_report.cases import Case, CaseTable, abstract, abstract_plan
from experiments.compile_report.target import GpuTarget
from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.clusters import ClusteredKV, KeySlots
from pallas_kernels.codecs import IDENTITY, TensorCodec, codec_of
from pallas_kernels.coded_kv import CodedKV, Encoded, LayerKV
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.implementations import AttentionShapes, Operation
from pallas_kernels.plans import DecodeReads, NewTokens, OwnChunks, PrefillPlan, PrefillReads
from pallas_kernels.prefill_attention import PREFILL_ATTENTION
from pallas_kernels.stored_kv import StoredKV
from pallas_kernels.windows import Window

BACKENDS = ("pallas_triton", "pallas_mosaic_gpu")
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 80, 128, 256)
CHUNK_SIZES = (16, 32, 64, 128, 256)
GROUPS = (1, 3, 4, 8, 16)
CODECS = ("int8", "int4", "int4/int2", "fp8")
_ROWS, _KV_HEADS, _LAYERS, _CHUNKS = 64, 8, 2, 1024
_WINDOWS = (None, Window(512, sinks=4))
_COLUMNS = 512


@dataclass(frozen=True)
class KernelVariant:
    """An operation's kernels, for one set of the sizes they are compiled for.

    `query_tile` is that of Mosaic's chunk-first kernel; Triton's choose theirs as they run.
    `softcap` is that of the attention. `codec` is the name of what chunks are encoded by. `windows`
    is whether some heads see the last tokens only, `choices` whether rows read a part of items,
    `clusters` whether query heads have keys in common.
    """

    backend: str
    dtype: str = "bfloat16"
    head_dim: int = 128
    chunk_size: int = 64
    group: int = 4
    operation: Operation = CHUNK_ATTENTION
    query_tile: int | None = None
    softcap: float | None = None
    codec: str = IDENTITY
    windows: bool = False
    choices: bool = False
    clusters: bool = False

    @property
    def name(self) -> str:
        sizes = f"{self.dtype} d{self.head_dim} c{self.chunk_size} g{self.group}"
        tile = f" tile {self.query_tile}" if self.query_tile else ""
        prefill = " prefill" if self.operation is PREFILL_ATTENTION else ""
        softcap = " softcap" if self.softcap is not None else ""
        codec = f" {self.codec}" if self.codec != IDENTITY else ""
        windows = " windows" if self.windows else ""
        choices = " choices" if self.choices else ""
        clusters = " clusters" if self.clusters else ""
        return f"{self.backend}{prefill} {sizes}{tile}{softcap}{codec}{windows}{choices}{clusters}"

    @property
    def heads(self) -> GroupedHeads:
        """As attention sees them: with clusters a KV head for each query head."""
        query_heads = _KV_HEADS * self.group
        return GroupedHeads(query_heads, query_heads if self.clusters else _KV_HEADS)

    def unsupported(self) -> str | None:
        """Why the backend does not take these sizes; None when it does."""
        sizes = self.heads.group, self.head_dim, self.chunk_size
        how = codec_of(self.codec), self.choices, self.clusters
        shapes = AttentionShapes(self.dtype, *sizes, *how)
        return _module(self.operation, self.backend).unsupported(shapes)

    def case(self, target: GpuTarget) -> Case:
        """The operation, with abstract arguments."""
        num_heads, kv_heads = self.heads.query_heads, self.heads.kv_heads
        attention = AttentionSpec.of(num_heads, kv_heads, self.head_dim, softcap=self.softcap)
        options = {} if self.query_tile is None else {"query_tile": self.query_tile}
        attend = self.operation.function(self.backend)
        q = abstract((_ROWS, num_heads, self.head_dim), self.dtype)
        stored = self._stored()
        of_heads = abstract((kv_heads,)) if self.windows else None
        exact = stored.codec is not None or self.clusters  # what a query reads beside full chunks
        if self.operation is PREFILL_ATTENTION:
            new = abstract((_ROWS, kv_heads, self.head_dim), self.dtype)
            new = jax.eval_shape(NewTokens, new, new) if exact else None
            reads = jax.eval_shape(
                lambda plan, new, of_heads: PrefillReads(plan, QUERY_TILE, new, of_heads),
                _prefill_plan(self),
                new,
                of_heads,
            )
        else:
            lengths, tail = abstract((_ROWS,)), self._pool(_ROWS, kv_heads)
            own = jax.eval_shape(OwnChunks, tail, tail, lengths) if exact else None
            plan = abstract_plan(
                _ROWS,
                windows=len(_WINDOWS) if self.windows else None,
                columns=_COLUMNS if self.choices else None,
            )
            reads = jax.eval_shape(DecodeReads, plan, lengths, own, of_heads)
        return Case(
            lambda *operands: attend(*operands, attention, **options),
            (q, stored, reads),
            chunk_bytes=_chunk_bytes(stored),
        )

    def _pool(self, num_chunks: int, kv_heads: int = _KV_HEADS) -> Any:
        shape = (_LAYERS, kv_heads, num_chunks, self.chunk_size, self.head_dim)
        return abstract(shape, self.dtype)

    def _stored(self) -> LayerKV:
        codec, pool = codec_of(self.codec), self._pool(_CHUNKS)
        if self.clusters:
            heads = GroupedHeads(self.heads.query_heads, _KV_HEADS)
            slots = KeySlots(heads, (_KV_HEADS,) * _LAYERS)
            keys = abstract((slots.total, *pool.shape[2:]), self.dtype)
            maps = abstract((_LAYERS, _CHUNKS, heads.query_heads), jnp.uint8)
            clustered = partial(ClusteredKV, slots=slots)
            return jax.eval_shape(clustered, keys, pool, maps, maps, abstract(()))
        if codec is None:
            return jax.eval_shape(StoredKV, pool, pool, abstract(()))
        sizes = self.chunk_size, self.head_dim

        def arrays(part: TensorCodec) -> Encoded:
            outer = _LAYERS, _KV_HEADS, _CHUNKS
            return {
                name: abstract((*outer, *one.shape), one.dtype)
                for name, one in part.arrays(*sizes).items()
            }

        coded = partial(CodedKV, codec=codec, chunk_size=sizes[0], head_dim=sizes[1])
        return jax.eval_shape(coded, arrays(codec.keys), arrays(codec.values), abstract(()))


def available_backends() -> tuple[str, ...]:
    """The GPU backends that this version of the project has."""
    return tuple(name for name in BACKENDS if name in CHUNK_ATTENTION.implementations)


def variant_names(backends: Collection[str] = BACKENDS, every: bool = False) -> list[str]:
    """The variants that exist: of all sizes, or of some around bfloat16, 128, 64, 4; those of
    Gemma 2, of encoded chunks, of windows, of choices and of clusters.
    """
    choose = _every_combination if every else _one_at_a_time
    return [
        variant.name
        for backend in available_backends()
        if backend in backends
        for variant in (*choose(backend), *_others(backend))
        if variant.unsupported() is None
    ]


def kernel_variants() -> CaseTable:
    """By name, every combination of backend and sizes, those of Gemma 2, of encoded chunks, of
    windows, of choices and of clusters; some do not exist."""
    return {
        variant.name: variant.case
        for backend in available_backends()
        for variant in (*_every_combination(backend), *_others(backend))
    }


def _every_combination(backend: str) -> Iterator[KernelVariant]:
    for kind in _kinds(backend):
        for sizes in itertools.product(DTYPES, HEAD_DIMS, CHUNK_SIZES, GROUPS):
            yield KernelVariant(backend, *sizes, **kind)


def _one_at_a_time(backend: str) -> Iterator[KernelVariant]:
    for kind in _kinds(backend):
        for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
            yield KernelVariant(backend, dtype, head_dim, **kind)
        for chunk_size in CHUNK_SIZES:
            if chunk_size != KernelVariant.chunk_size:
                yield KernelVariant(backend, chunk_size=chunk_size, **kind)
        for group in GROUPS:
            if group != KernelVariant.group:
                yield KernelVariant(backend, group=group, **kind)


def _others(backend: str) -> Iterator[KernelVariant]:
    yield from _gemma_2(backend)
    yield from _coded(backend)
    yield from _windowed(backend)
    yield from _choosing(backend)
    yield from _clustered(backend)


def _gemma_2(backend: str) -> Iterator[KernelVariant]:
    """Soft-capped attention with the heads of the 2B and 9B models, and of the 27B model."""
    for operation in (CHUNK_ATTENTION, PREFILL_ATTENTION):
        if backend in operation.implementations:
            for head_dim in (256, 128):
                yield KernelVariant(
                    backend, head_dim=head_dim, group=2, operation=operation, softcap=50.0
                )


def _coded(backend: str) -> Iterator[KernelVariant]:
    """Every codec with the sizes of most models, and one with others."""
    for operation in (CHUNK_ATTENTION, PREFILL_ATTENTION):
        if backend in operation.implementations:
            for codec in CODECS:
                yield KernelVariant(backend, operation=operation, codec=codec)
            int4 = partial(KernelVariant, backend, operation=operation, codec="int4")
            yield int4(head_dim=64, group=1)
            yield int4(chunk_size=16, group=8)
            yield int4(chunk_size=256)
            yield int4("float16")
            yield int4("float32", head_dim=64)
    if backend == "pallas_mosaic_gpu":
        yield KernelVariant(backend, query_tile=128, codec="int4")
        yield KernelVariant(backend, head_dim=64, chunk_size=256, query_tile=128, codec="int8")
        yield KernelVariant(backend, chunk_size=256, group=3, codec="int8/int4")
        yield KernelVariant(backend, "float16", chunk_size=16, codec="fp8_e5m2")


def _windowed(backend: str) -> Iterator[KernelVariant]:
    """Windows with the heads of most models, of Gemma 2 and 3, and of encoded chunks."""
    for operation in (CHUNK_ATTENTION, PREFILL_ATTENTION):
        if backend in operation.implementations:
            variant = partial(KernelVariant, backend, operation=operation, windows=True)
            yield variant()
            yield variant(head_dim=64, group=1)
            yield variant(head_dim=256, group=2, softcap=50.0)
            yield variant("float32", head_dim=64, chunk_size=16, group=3)
            yield variant(chunk_size=16, group=8)
            for codec in ("int8", "int4"):
                yield variant(codec=codec)


def _choosing(backend: str) -> Iterator[KernelVariant]:
    """Rows that have chosen chunks, with the heads of most models, windows, and encoded chunks."""
    variant = partial(KernelVariant, backend, choices=True)
    yield variant()
    yield variant(head_dim=64, group=1)
    yield variant(chunk_size=256, group=8)
    yield variant(windows=True)
    if backend == "pallas_triton":
        yield variant("float32", head_dim=64, chunk_size=16, group=3)
    for codec in ("int8", "int4"):
        yield variant(codec=codec)


def _clustered(backend: str) -> Iterator[KernelVariant]:
    """Clustered heads of most models, and of others."""
    for operation in (CHUNK_ATTENTION, PREFILL_ATTENTION):
        if backend in operation.implementations:
            variant = partial(KernelVariant, backend, operation=operation, clusters=True)
            yield variant()
            yield variant(head_dim=64, group=1)
            yield variant(head_dim=256, group=2, softcap=50.0)
            yield variant(chunk_size=16, group=8)
            for dim in (32, 64, 128):
                yield variant("float32", head_dim=dim, chunk_size=32, group=3)


def _kinds(backend: str) -> Iterator[dict[str, Any]]:
    """The operations of a backend, each query tile of one apart."""
    yield {}
    if backend == "pallas_mosaic_gpu":
        yield {"query_tile": 128}
    if backend in PREFILL_ATTENTION.implementations:
        yield {"operation": PREFILL_ATTENTION}


def _prefill_plan(variant: KernelVariant) -> PrefillPlan:
    segment = Segment([0] * _ROWS, list(range(_ROWS)), 0, _ROWS, 0)
    options = PlannerOptions.for_gpu(
        num_heads=variant.heads.query_heads,
        num_kv_heads=variant.heads.kv_heads,
        head_dim=variant.head_dim,
        chunk_size=variant.chunk_size,
    )
    batch = pack_segments(
        [segment],
        num_tokens=_ROWS,
        chunk_size=variant.chunk_size,
        num_chunks=_CHUNKS,
        options=options,
        windows=_WINDOWS if variant.windows else (),
    )
    return jax.tree.map(lambda x: abstract(x.shape, x.dtype), batch.plan)


def _chunk_bytes(stored: LayerKV) -> int:
    arrays = jax.tree.leaves((stored.keys, stored.values))
    if isinstance(stored, ClusteredKV):
        arrays = [stored.values, stored.values]  # keys of a head are as large
    return sum(math.prod(array.shape[3:]) * array.dtype.itemsize for array in arrays)


def _module(operation: Operation, backend: str) -> ModuleType:
    return importlib.import_module(f"{operation.package}.{backend}")
