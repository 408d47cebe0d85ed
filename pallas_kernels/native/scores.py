"""How well chunks score for queries that choose, by the compiled kernel."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.codecs import AffineCodec
from pallas_kernels.native import library
from pallas_kernels.native.devices import split_by_heads
from pallas_kernels.native.operands import FORMATS
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.selection.asking import Asking


def chunk_shares(
    q: Float[Array, "A Hq D"],
    asking: Asking,
    known: Mapping[str, Shaped[Array, "L Hkv N ..."]],
    layer: Int32[Array, ""],
    attention: AttentionSpec,
    *,
    codec: AffineCodec | None = None,
    chunk_size: int = 0,
) -> Float32[Array, "A Hq P"]:
    """See `pallas_kernels.selection.estimates.CompiledEstimate`."""
    items = asking.items
    numbers = (
        asking.chunk,
        asking.own_column,
        asking.table,
        asking.tables,
        items.row_begin,
        items.row_count,
        items.chunk_begin,
        items.chunk_count,
        items.chunks,
        items.count,
        asking.item_column,
        layer,
    )
    if codec is None:
        names, absent, format_ = ("bounds",), {}, []
    else:
        names, absent = ("codes", "scale", "zero", "first"), {"first": np.zeros(0, np.uint8)}
        format_ = [chunk_size, *FORMATS[AffineCodec](codec)]
    operands: list[HostOrDevice] = [q.astype(jnp.float32)]
    operands += [jnp.asarray(one, jnp.int32) for one in numbers]
    axes: list[int | None] = [1] + [None] * len(numbers)
    for name in names:
        operands.append(known[name] if name in known else absent[name])
        axes.append(1 if name in known else None)
    attributes = {
        "scale": np.float32(attention.scale),
        "softcap": np.float32(attention.softcap or 0),
        "codes": np.array(format_, np.int64),
    }

    def call(queries: Array, *others: Array) -> Array:
        shape = *queries.shape[:2], asking.columns
        output = jax.ShapeDtypeStruct(shape, jnp.float32)
        return library.call(library.SHARES, (queries, *others), output, **attributes)

    return split_by_heads(call, operands, axes, group=attention.heads.group)
