"""The operands of the compiled kernel, in the order in which `bindings.cc` takes them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.native import library
from pallas_kernels.plans import ChosenTiles, DecodeReads, HiddenTokens, HostOrDevice, PrefillReads
from pallas_kernels.stored_kv import StoredKV

NOTHING = np.zeros(0, np.int32)
"""What stands for an array that a plan does not have."""
DTYPES = ("float32", "bfloat16", "float16")


def unsupported(shapes: AttentionShapes) -> str | None:
    """Why the kernel cannot read such a pool, if it cannot."""
    if shapes.dtype not in DTYPES:
        return f"it reads {', '.join(DTYPES)}, not {shapes.dtype}"
    if shapes.codec is not None:
        return "it reads no codes yet"
    if shapes.clustered:
        return "it reads no clustered heads"
    return None


def decode(
    q: Float[Array, "B Hq D"], stored: LayerKV, reads: DecodeReads, attention: AttentionSpec
) -> Float[Array, "B Hq D"]:
    """Attention of rows that decode."""
    plan, of = reads.plan, _by_window(reads)
    tiles = plan.tiles or ChosenTiles(NOTHING, NOTHING, NOTHING)
    of_tiles = [NOTHING] * 3 if plan.tiles is None else [of(tiles.chunks), of(tiles.rows)]
    if plan.tiles is not None:
        of_tiles.append(of(tiles.count))
    operands = [
        *_common(q, stored, reads),
        of(plan.private_chunks),
        of(plan.covered_tokens),
        _ints(reads.lengths),
        *of_tiles,
        NOTHING,  # slots of rows' own chunks
        *_no_tokens(),
        *_arrays(stored),
    ]
    return _call("chunk_attention_decode", q, operands, attention)


def prefill(
    q: Float[Array, "T Hq D"], stored: LayerKV, reads: PrefillReads, attention: AttentionSpec
) -> Float[Array, "T Hq D"]:
    """Attention of packed new tokens."""
    plan, of = reads.plan, _by_window(reads)
    operands = [
        *_common(q, stored, reads),
        *map(_ints, (plan.tile_begin, plan.tile_count, plan.tile_position, plan.tile_sequence)),
        _ints(plan.num_tiles),
        of(plan.own_chunk),
        of(plan.block_tables),
        *_no_tokens(),
        *_arrays(stored),
    ]
    return _call("chunk_attention_prefill", q, operands, attention)


def _common(q: Array, stored: LayerKV, reads: DecodeReads | PrefillReads) -> list[HostOrDevice]:
    items, of = reads.plan.items, _by_window(reads)
    hidden: HiddenTokens | None = reads.plan.hidden
    nothing = [NOTHING] * 4
    return [
        q.astype(jnp.float32),
        NOTHING if reads.head_windows is None else _ints(reads.head_windows),
        stored.layer_operand(),
        of(items.row_begin),
        of(items.row_count),
        of(items.chunk_begin),
        of(items.chunk_count),
        of(items.chunks),
        of(items.count),
        *(nothing if hidden is None else map(_ints, _fields(hidden))),
    ]


def _fields(hidden: HiddenTokens) -> tuple[HostOrDevice, ...]:
    return hidden.size, hidden.sinks, hidden.begin, hidden.offset


def _by_window(reads: DecodeReads | PrefillReads) -> Callable[[HostOrDevice], Int32[Array, W * _]]:
    """Gives arrays of the plan a first axis over windows, if they have none."""
    windowed = reads.plan.hidden is not None
    return lambda array: _ints(array) if windowed else _ints(array)[None]


def _ints(array: HostOrDevice) -> Int32[Array, "*_"]:
    return jnp.asarray(array, jnp.int32)


def _no_tokens() -> list[np.ndarray]:
    return [np.zeros(0, np.float32)] * 2


def _arrays(stored: LayerKV) -> list[Array]:
    assert isinstance(stored, StoredKV), "others are not supported"
    return [stored.keys, stored.values]


def _call(name: str, q: Array, operands: list, attention: AttentionSpec) -> Array:
    output = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    scale, softcap = np.float32(attention.scale), np.float32(attention.softcap or 0)
    return library.call(name, operands, output, scale=scale, softcap=softcap).astype(q.dtype)
