"""The definition of attention within a packed tree: all pairs of tokens, masked."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.tree_attention.plan import HeadWindows, TreePlan


def tree_attention(
    q: Float[Array, "T Hq D"],
    keys: Float[Array, "T Hkv D"],
    values: Float[Array, "T Hkv D"],
    plan: TreePlan,
    windows: HeadWindows | None,
    attention: AttentionSpec,
) -> Float[Array, "T Hq D"]:
    """See `pallas_kernels.tree_attention.api.tree_attention`; in the operands' own precision, and
    float32 at least."""
    wide = q.dtype if q.dtype == jnp.float64 else jnp.float32
    group, outputs = attention.heads.group, []
    for head in range(keys.shape[1]):
        window = None if windows is None else (windows.sizes[head], windows.sinks[head])
        seen = plan.sees(0, 0, len(q), window)[None]
        queries = q[:, head * group : (head + 1) * group].astype(wide) * attention.scale
        of_head = {"preferred_element_type": wide, "precision": "highest"}
        scores = jnp.einsum("tgd,sd->gts", queries, keys[:, head].astype(wide), **of_head)
        scores = jnp.where(seen, attention.cap(scores), -jnp.inf)
        top = jnp.where(seen.any(-1), scores.max(-1), 0)[..., None]
        weights = jnp.where(seen, jnp.exp(scores - top), 0)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        outputs.append(jnp.einsum("gts,sd->tgd", weights, values[:, head].astype(wide), **of_head))
    return jnp.concatenate(outputs, axis=1).astype(q.dtype)
