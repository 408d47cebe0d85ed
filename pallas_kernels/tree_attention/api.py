"""Attention within a packed tree of tokens, with gradients."""

from __future__ import annotations

from importlib import import_module

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.implementations import check_known
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.tree_attention.plan import HeadWindows, TreePlan

IMPLEMENTATIONS = ("reference", "xla")


def tree_attention(
    q: Float[HostOrDevice, "T Hq D"],
    keys: Float[HostOrDevice, "T Hkv D"],
    values: Float[HostOrDevice, "T Hkv D"],
    plan: TreePlan,
    *,
    windows: HeadWindows | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T Hq D"]:
    """Softmax attention of each token of a packed tree to itself and those above it.

    Derivatives are of the first order and in reverse mode. What the backward pass keeps is the
    output and a number for each query head; weights are computed again, tile by tile
    (FlashAttention-2, arXiv 2307.08691, algorithm 2). Scores and sums are in float32. In a
    `jax.shard_map`, "xla" needs `check_vma=False`.

    Args:
      q, keys, values: of T packed tokens, padding among them, which gets zeros.
      plan: of the tree, as `jax_chunkattn.TokenTree` makes it.
      windows: of the KV heads; None where all see all.
      scale: multiplies the scores; `1 / sqrt(D)` by default.
      softcap: keeps scaled scores within (-softcap, softcap), as for `prefill_attention`.
      implementation: one of `IMPLEMENTATIONS`; "xla" for None.

    Raises:
      ValueError: for an implementation that is unknown, heads that do not divide, operands that
        are not of the plan's tokens, or a softcap that is not positive and finite.
    """
    name = "xla" if implementation is None else implementation
    check_known(name, IMPLEMENTATIONS)
    if not len(q) == len(keys) == len(values) == len(plan.ends):
        raise ValueError(
            f"there are {len(q)} queries, {len(keys)} keys and {len(values)} values, and the plan "
            f"is of {len(plan.ends)} tokens, padding among them"
        )
    sizes = q.shape[1], keys.shape[1], q.shape[2]
    attention = AttentionSpec.of(*sizes, scale=scale, softcap=softcap)
    function = import_module(f"pallas_kernels.tree_attention.{name}").tree_attention
    operands = jax.tree.map(jnp.asarray, (q, keys, values, plan, windows))
    return function(*operands, attention)
