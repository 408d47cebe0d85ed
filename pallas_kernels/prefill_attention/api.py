"""Attention of new tokens to a cached prefix and, causally, to themselves."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.implementations import Operation
from pallas_kernels.plans import HostOrDevice, PrefillPlan, PrefillReads, windows_of_heads
from pallas_kernels.stored_kv import StoredKV

PREFILL_ATTENTION: Operation[PrefillReads] = Operation(
    "pallas_kernels.prefill_attention",
    "prefill_attention",
    ("reference", "xla", "native", "batch_invariant", "pallas_triton"),
)
IMPLEMENTATIONS = PREFILL_ATTENTION.implementations


def prefill_attention(
    q: Float[HostOrDevice, "T Hq D"],
    keys: Float[HostOrDevice, "L Hkv N C D"],
    values: Float[HostOrDevice, "L Hkv N C D"],
    plan: PrefillPlan,
    *,
    query_tile: int,
    layer: int | Int32[Array, ""] = 0,
    scale: float | None = None,
    softcap: float | None = None,
    head_windows: Int32[HostOrDevice, " Hkv"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T Hq D"]:
    """Causal softmax attention of packed new tokens over their sequences' chunks.

    The keys and values of the new tokens must already be in the pool: a token attends to every
    position of its sequence up to its own. Tokens of one call may therefore depend on one another,
    also across sequences that share a prefix computed in the same call.

    Args:
      q: queries of T packed tokens; padding gives zeros.
      keys, values: the pool of all layers.
      plan: the tiles and block tables, as `jax_chunkattn.planning.prefill` makes them.
      query_tile: most tokens a tile of the plan has.
      layer: which layer of the pool to read; may be traced.
      scale: multiplies the scores; `1 / sqrt(D)` by default.
      softcap: keeps scaled scores within (-softcap, softcap), as `softcap * tanh(score / softcap)`
        (Gemma 2, arXiv 2408.00118, section 2). None leaves them as they are.
      head_windows: by which of the windows that the plan was made for each KV head reads, from 0 to
        W - 1; None by the first. For plans with windows.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that runs here.

    Raises:
      ValueError: for an implementation that is unknown or cannot run here, a plan without what it
        needs, heads that do not divide, a head_dim that differs from the pool's, a softcap that is
        not positive and finite, or windows of heads for a plan that has none.
    """
    stored = StoredKV(jnp.asarray(keys), jnp.asarray(values), layer)
    sizes = q.shape[1], stored.kv_heads, stored.head_dim
    attention = AttentionSpec.of(*sizes, scale=scale, softcap=softcap)
    windows = windows_of_heads(plan, head_windows, sizes[1])
    reads = PrefillReads(plan, query_tile, head_windows=windows)
    return PREFILL_ATTENTION.attend(q, stored, reads, attention, implementation=implementation)
