"""Attention of new tokens to a cached prefix and, causally, to themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import resolve
from pallas_kernels.plans import PrefillPlan
from pallas_kernels.prefill_attention import reference, xla

IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.prefill_attention,
    "reference": reference.prefill_attention,
}


@functools.partial(jax.jit, static_argnames=("scale", "query_tile", "implementation"), inline=True)
def prefill_attention(
    q: Float[Array, "T Hq D"],
    keys: Float[Array, "L Hkv N C D"],
    values: Float[Array, "L Hkv N C D"],
    plan: PrefillPlan,
    *,
    query_tile: int,
    layer: int | Int32[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T Hq D"]:
    """Causal softmax attention of packed new tokens over their sequences' chunks.

    The keys and values of the new tokens must already be in the pool: a token attends to every
    position of its sequence up to its own. Tokens of one call may therefore depend on one another,
    also across sequences that share a prefix computed in the same call.

    Args:
      q: queries of T packed tokens; padding gives zeros.
      keys, values: the pool of all layers.
      plan: the tiles and block tables, as `jax_chunkattn.plan_prefill` makes them.
      query_tile: most tokens a tile of the plan has.
      layer: which layer of the pool to read; may be traced.
      scale: multiplies the scores; `1 / sqrt(D)` by default.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that runs here.

    Raises:
      ValueError: for an unknown implementation.
    """
    function = IMPLEMENTATIONS[resolve(implementation, IMPLEMENTATIONS)]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    return function(q, keys, values, plan, layer=layer, scale=scale, query_tile=query_tile)
