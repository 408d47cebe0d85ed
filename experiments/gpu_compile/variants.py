"""The Pallas kernels to compile one by one: backends, dtypes, head sizes, chunk sizes, groups."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from experiments.gpu_compile.cases import Case, CaseTable, abstract, abstract_plan
from experiments.gpu_compile.target import GpuTarget
from pallas_kernels.implementations import AttentionShapes

BACKENDS = ("pallas_triton", "pallas_mosaic_gpu")
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 80, 128, 256)
CHUNK_SIZES = (16, 32, 64, 128, 256)
GROUPS = (1, 3, 4, 8, 16)
_ROWS, _KV_HEADS, _LAYERS, _CHUNKS = 64, 8, 2, 1024


@dataclass(frozen=True)
class KernelVariant:
    """Both kernels of two-phase attention, for one set of the sizes they are compiled for."""

    backend: str
    dtype: str = "bfloat16"
    head_dim: int = 128
    chunk_size: int = 64
    group: int = 4

    @property
    def name(self) -> str:
        return f"{self.backend} {self.dtype} d{self.head_dim} c{self.chunk_size} g{self.group}"

    def unsupported(self) -> str | None:
        """Why the backend does not take these sizes; None when it does."""
        shapes = AttentionShapes(self.dtype, self.group, self.head_dim, self.chunk_size)
        return _backend_module(self.backend).unsupported(shapes)

    def case(self, target: GpuTarget) -> Case:
        def attend(q, keys, values, plan, lengths, layer):
            return _backend_module(self.backend).chunk_attention(
                q, keys, values, plan, lengths, layer=layer, scale=1 / math.sqrt(self.head_dim)
            )

        pool = (_LAYERS, _KV_HEADS, _CHUNKS, self.chunk_size, self.head_dim)
        arguments = (
            abstract((_ROWS, _KV_HEADS * self.group, self.head_dim), self.dtype),
            abstract(pool, self.dtype),
            abstract(pool, self.dtype),
            abstract_plan(_ROWS),
            abstract((_ROWS,)),
            abstract(()),
        )
        return Case(attend, arguments)


def available_backends() -> tuple[str, ...]:
    """The GPU backends that this version of the project has."""
    return tuple(name for name in BACKENDS if importlib.util.find_spec(_module_name(name)))


def variant_names(backends: Collection[str] = BACKENDS, every: bool = False) -> list[str]:
    """The variants that exist: of all sizes, or of some around bfloat16, 128, 64, 4."""
    choose = _every_combination if every else _one_at_a_time
    return [
        variant.name
        for backend in available_backends()
        if backend in backends
        for variant in choose(backend)
        if variant.unsupported() is None
    ]


def kernel_variants() -> CaseTable:
    """Every combination of backend and sizes, by name; some do not exist."""
    return {
        variant.name: variant.case
        for backend in available_backends()
        for variant in _every_combination(backend)
    }


def _every_combination(backend: str) -> Iterator[KernelVariant]:
    for sizes in itertools.product(DTYPES, HEAD_DIMS, CHUNK_SIZES, GROUPS):
        yield KernelVariant(backend, *sizes)


def _one_at_a_time(backend: str) -> Iterator[KernelVariant]:
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        yield KernelVariant(backend, dtype, head_dim)
    for chunk_size in CHUNK_SIZES:
        if chunk_size != KernelVariant.chunk_size:
            yield KernelVariant(backend, chunk_size=chunk_size)
    for group in GROUPS:
        if group != KernelVariant.group:
            yield KernelVariant(backend, group=group)


def _backend_module(backend: str):
    return importlib.import_module(_module_name(backend))


def _module_name(backend: str) -> str:
    return f"pallas_kernels.chunk_attention.{backend}"
