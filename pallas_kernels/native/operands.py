"""The operands of the compiled kernel, in the order in which `bindings.cc` takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.codecs import AffineCodec, ScaledFloatCodec
from pallas_kernels.coded_kv import CodedKV, Encoded, LayerKV
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.native import library, problem_of
from pallas_kernels.native.devices import split_by_heads
from pallas_kernels.plans import (
    DecodeReads,
    HiddenTokens,
    HostOrDevice,
    NewTokens,
    OwnChunks,
    PrefillReads,
)
from pallas_kernels.stored_kv import StoredKV

NOTHING = np.zeros(0, np.int32)
"""What stands for an array that a plan does not have."""
NO_TOKENS = np.zeros(0, np.float32)
FORMATS: dict[type, Callable[[Any], tuple[int, int, int]]] = {
    AffineCodec: lambda codec: (1, codec.bits, codec.along == "channels"),
    ScaledFloatCodec: lambda codec: (2, jnp.finfo(codec.dtype).nmant, 0),
}
"""The codecs whose codes it reads: a number for each kind, and two of what it depends on."""


class _ByHead(NamedTuple):
    """An operand with KV heads, or query heads, on an axis."""

    array: HostOrDevice
    axis: int = 1


_Operands = list[HostOrDevice | _ByHead]


def unsupported(shapes: AttentionShapes) -> str | None:
    """Why the kernel cannot read such a pool, if it cannot."""
    if unread := problem_of(shapes.dtype):
        return unread
    codec = shapes.codec
    if codec is not None and not {type(codec.keys), type(codec.values)} <= set(FORMATS):
        return f"it does not read {codec.name}"
    if shapes.clustered:
        return "it reads no clustered heads"
    return None


def unsupported_invariant(shapes: AttentionShapes) -> str | None:
    """Why the kernel cannot do so batch-invariant, if it cannot."""
    if shapes.chosen:
        return "what tokens choose to read depends on sums that are not batch-invariant"
    return unsupported(shapes)


def decode(
    q: Float[Array, "B Hq D"],
    stored: LayerKV,
    reads: DecodeReads,
    attention: AttentionSpec,
    *,
    batch_invariant: bool = False,
) -> Float[Array, "B Hq D"]:
    """Attention of rows that decode; the same bits whatever the plan, if it is batch-invariant."""
    plan, of, tiles, own = reads.plan, _by_window(reads), reads.plan.tiles, reads.own
    if batch_invariant and tiles is not None:
        raise ValueError("tiles that rows have chosen are not in the order of their sequences")
    operands = [
        *_common(q, stored, reads),
        of(plan.private_chunks),
        of(plan.covered_tokens),
        _ints(reads.lengths),
        *([NOTHING] * 3 if tiles is None else map(of, (tiles.chunks, tiles.rows, tiles.count))),
        NOTHING if own is None else _ints(own.slots),
        *_exact(own),
        *_arrays(stored),
    ]
    return _call(library.DECODE, q, stored, operands, attention, batch_invariant)


def prefill(
    q: Float[Array, "T Hq D"],
    stored: LayerKV,
    reads: PrefillReads,
    attention: AttentionSpec,
    *,
    batch_invariant: bool = False,
) -> Float[Array, "T Hq D"]:
    """Attention of packed new tokens; the same bits whatever the plan, if it is batch-invariant."""
    plan, of, new = reads.plan, _by_window(reads), reads.new
    operands = [
        *_common(q, stored, reads),
        *map(_ints, (plan.tile_begin, plan.tile_count, plan.tile_position, plan.tile_sequence)),
        _ints(plan.num_tiles),
        of(plan.own_chunk),
        of(plan.block_tables),
        *_exact(new),
        *_arrays(stored),
    ]
    return _call(library.PREFILL, q, stored, operands, attention, batch_invariant)


def _common(q: Array, stored: LayerKV, reads: DecodeReads | PrefillReads) -> _Operands:
    items, of = reads.plan.items, _by_window(reads)
    hidden = reads.plan.hidden
    return [
        _ByHead(q.astype(jnp.float32)),
        NOTHING if reads.head_windows is None else _ByHead(_ints(reads.head_windows), axis=0),
        stored.layer_operand(),
        of(items.row_begin),
        of(items.row_count),
        of(items.chunk_begin),
        of(items.chunk_count),
        of(items.chunks),
        of(items.count),
        *([NOTHING] * 4 if hidden is None else map(_ints, _fields(hidden))),
    ]


def _fields(hidden: HiddenTokens) -> tuple[HostOrDevice, ...]:
    return hidden.size, hidden.sinks, hidden.begin, hidden.offset


def _by_window(reads: DecodeReads | PrefillReads) -> Callable[[HostOrDevice], Array]:
    """Gives arrays of the plan a first axis over windows, if they have none."""
    windowed = reads.plan.hidden is not None
    return lambda array: _ints(array) if windowed else _ints(array)[None]


def _ints(array: HostOrDevice) -> Int32[Array, "*_"]:
    return jnp.asarray(array, jnp.int32)


def _exact(tokens: OwnChunks | NewTokens | None) -> _Operands:
    """Keys and values that are beside the pool, exact."""
    if tokens is None:
        return [NO_TOKENS, NO_TOKENS]
    return [_ByHead(tokens.keys), _ByHead(tokens.values)]


def _arrays(stored: LayerKV) -> _Operands:
    if isinstance(stored, StoredKV):
        return [_ByHead(stored.keys), _ByHead(stored.values)]
    assert isinstance(stored, CodedKV), "others are not supported"
    return [*_codes(stored.keys), *_codes(stored.values)]


def _codes(encoded: Encoded) -> _Operands:
    nothing = {"zero": np.zeros(0, np.float16), "first": np.zeros(0, np.uint8)}
    arrays = nothing | {name: _ByHead(array) for name, array in encoded.items()}
    return [arrays[name] for name in ("codes", "scale", "zero", "first")]


def _formats(stored: LayerKV) -> np.ndarray:
    """Empty for chunks that are stored as they are; else their size, and three numbers for what
    keys are encoded by and three for values."""
    codec = stored.codec
    parts = () if codec is None else (codec.keys, codec.values)
    formats = [number for part in parts for number in FORMATS[type(part)](part)]
    return np.array([stored.chunk_size, *formats] if formats else [], np.int64)


def _call(
    name: str,
    q: Array,
    stored: LayerKV,
    operands: _Operands,
    attention: AttentionSpec,
    batch_invariant: bool,
) -> Array:
    attributes = {
        "batch_invariant": batch_invariant,
        "scale": np.float32(attention.scale),
        "softcap": np.float32(attention.softcap or 0),
        "codes": _formats(stored),
    }

    def call(queries: Array, *others: Array) -> Array:
        output = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
        return library.call(name, (queries, *others), output, **attributes)

    arrays = [one.array if isinstance(one, _ByHead) else one for one in operands]
    axes = [one.axis if isinstance(one, _ByHead) else None for one in operands]
    group = q.shape[1] // stored.kv_heads
    return split_by_heads(call, arrays, axes, group=group).astype(q.dtype)
