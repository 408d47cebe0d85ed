"""Which implementations cannot run a case, and why: known before anything is made for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from experiments.baselines import torch_missing
from experiments.kernel.config import CODED, Implementation
from experiments.kernel.operands import bytes_per_token, copies_bytes, pool_bytes, shares
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import IDENTITY, CodecError, codec_of
from pallas_kernels.implementations import (
    COMPILED_HERE,
    AttentionShapes,
    ImplementationError,
    is_kernel,
    needs_partials,
)
from pallas_kernels.specs import AttentionCase
from pallas_kernels.targets import current_target

REFERENCE_SCORES = 1 << 24
"""The most scores the reference may hold: it scores every query against the whole pool."""

_DENSE = ("dense", "jax-dpa", "torch-sdpa")  # one copy serves them all
_PLAIN = ("cascade", "paged-shared-pages", "paged", *_DENSE)  # softmax(q k^T / sqrt(D)) v alone


def runnable_implementations() -> tuple[Implementation, ...]:
    """All that read chunks as they are, without the kernels that are for other devices."""
    on_gpu = current_target().is_nvidia

    def is_for_this(name: Implementation) -> bool:
        return on_gpu if needs_partials(name) else name not in COMPILED_HERE or not on_gpu

    return tuple(
        name for name in get_args(Implementation) if name not in CODED and is_for_this(name)
    )


def skip_reasons(
    case: AttentionCase, implementations: Sequence[Implementation], memory_gb: float
) -> dict[str, str]:
    """Those of `implementations` that cannot run this case within `memory_gb`, and why."""
    held = pool_bytes(case)
    if held > memory_gb * 1e9:
        reason = f"the pool takes {held / 1e9:.1f} GB, above --memory-gb {memory_gb:g}"
        return dict.fromkeys(implementations, reason)
    skipped = {}
    for name in implementations:
        reason = _unsupported(case, name)
        if reason is not None:
            skipped[name] = reason
    left = [name for name in implementations if name not in skipped]
    return skipped | _too_large(case, left, memory_gb)


def _unsupported(case: AttentionCase, name: Implementation) -> str | None:
    implementation, codec = CODED.get(name, (name, IDENTITY))
    chunk_codec = codec_of(codec)
    if chunk_codec is not None:
        try:
            chunk_codec.check(case.chunk_size, case.head_dim)
        except CodecError as error:
            return str(error)
    if is_kernel(implementation):
        group = case.num_heads // case.num_kv_heads
        shapes = AttentionShapes(case.dtype, group, case.head_dim, case.chunk_size, chunk_codec)
        try:
            CHUNK_ATTENTION.resolve(implementation, shapes)
        except ImplementationError as error:
            return str(error)
    if name in _PLAIN and not case.has_plain_scores:
        return "it knows neither a softcap nor a scale of its own"
    if name == "cascade" and any(case.batch % nodes for nodes in case.nodes_per_level):
        return "the nodes of a level have different numbers of rows below them"
    on_gpu = current_target().is_nvidia
    if name == "jax-dpa" and case.dtype == "float16" and not on_gpu:
        return "XLA has no matrix product for it in float16 on a CPU"
    if name == "torch-sdpa":
        if on_gpu:
            return "it runs on the CPU here; `python -m experiments gpu` times PyTorch on a GPU"
        return torch_missing()
    return None


def _too_large(case: AttentionCase, names: Sequence[str], memory_gb: float) -> dict[str, str]:
    held = pool_bytes(case)
    more = {
        ("paged",): copies_bytes(case) if shares(case) else 0,
        _DENSE: copies_bytes(case),
        ("cascade",): pool_bytes(case),
    }
    skipped = {}
    for group, size in more.items():
        wanted = [name for name in names if name in group]
        if wanted and held + size > memory_gb * 1e9:
            reason = (
                f"its copies take {size / 1e9:.1f} GB beside {held / 1e9:.1f} GB, "
                f"above --memory-gb {memory_gb:g}"
            )
            skipped |= dict.fromkeys(wanted, reason)
        elif wanted:
            held += size
    scores = case.batch * case.num_heads * pool_bytes(case) // bytes_per_token(case)
    if "reference" in names and scores > REFERENCE_SCORES:
        skipped["reference"] = (
            f"it would score every query against the whole pool, {scores / 1e6:.0f} million scores"
        )
    return skipped
