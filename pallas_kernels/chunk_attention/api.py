"""Decode attention over a chunk pool, in two phases."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention import reference, xla
from pallas_kernels.implementations import resolve
from pallas_kernels.plans import DecodePlan

IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.chunk_attention,
    "reference": reference.chunk_attention,
}


@functools.partial(jax.jit, static_argnames=("scale", "implementation"), inline=True)
def chunk_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "L Hkv N C D"],
    values: Float[Array, "L Hkv N C D"],
    plan: DecodePlan,
    lengths: Int32[Array, " B"],
    *,
    layer: int | Int32[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Hq D"]:
    """Softmax attention of one query per row over that row's chunks of the pool.

    ChunkAttention, arXiv 2402.15220, section 3.2: a chunk-first phase reads every shared run of
    chunks once for all the rows below it, a sequence-first phase adds each row's private chunks
    and merges. Accumulates in float32 whatever the dtype.

    Args:
      q: queries; query head `h` reads KV head `h // (Hq // Hkv)`.
      keys, values: the pool of all layers.
      plan: which chunks each row reads, as `jax_chunkattn.plan_decode` makes it.
      lengths: tokens each row attends to; the chunks in the plan must hold at least as many. A row
        of length 0 gives zeros.
      layer: which layer of the pool to read; may be traced.
      scale: multiplies the scores; `1 / sqrt(D)` by default.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that runs here.

    Raises:
      ValueError: for an unknown implementation, heads that do not divide, or a head_dim that
        differs from the pool's.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[-1]
    if q.shape[-1] != head_dim:
        raise ValueError(f"queries have head_dim {q.shape[-1]}, the pool has {head_dim}")
    if q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_heads} KV heads")
    function = IMPLEMENTATIONS[resolve(implementation, IMPLEMENTATIONS)]
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    return function(q, keys, values, plan, lengths, layer=layer, scale=scale)
