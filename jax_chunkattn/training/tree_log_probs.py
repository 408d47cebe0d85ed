"""How likely a model finds the tokens of a tree, as a function that can be differentiated.

A token that several sequences have in common is computed once, forward and backward: its gradient
is the sum of what all of them pass up to it, since they read the very same keys and values (Tree
Training, arXiv 2511.00413, serialises trees of trajectories in the same order).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jax_chunkattn.device.model_interface import Attend, CacheSpec, DecoderModel
from jax_chunkattn.device.weights import matching_values, named_leaves
from jax_chunkattn.training.token_tree import BLOCK_TOKENS, TokenTree
from pallas_kernels.tree_attention import HeadWindows, tree_attention


@runtime_checkable
class Rematerialising(Protocol):
    """A model that can compute its layers again in the backward pass, instead of keeping them.

    What `attend` names with `jax.ad_checkpoint.checkpoint_name` it should keep; see
    `pallas_kernels.tree_attention.KEPT`.
    """

    remat: bool


def tree_log_probs(
    model: DecoderModel,
    params: Any,
    tree: TokenTree,
    *,
    remat: bool = True,
    implementation: str | None = None,
) -> Float32[Array, "B L"]:
    """Log-probabilities of the tokens that a tree asks for, differentiable in `params`.

    Natural logarithms, of each sequence's tokens from its `begin` on, and 0 where a sequence has
    less than L of them (`tree.mask` says where): as from a batch of padded sequences, and so are
    its gradients. Of a layer, what it was given, the output of attention and a number for each
    query head are kept for the backward pass, in which the rest is computed again; logits are there
    for `BLOCK_TOKENS` tokens at once. To be called in a jitted function.

    All are NaN when a token is outside the model's vocabulary, or a sequence longer than the
    positions it has: what is traced cannot be refused.

    Args:
      model: says what to compute; its own weights are not used.
      params: the weights: `nnx.state(model)`, or any tree of arrays with the same paths. It is
        computed in their types, and not in the model's.
      remat: whether layers are computed again in the backward pass. False keeps all of them: a
        quarter less work, for many times the memory. A model that is not `Rematerialising` decides
        by itself.
      implementation: of attention; see `tree_attention`.

    Raises:
      InvalidWeights: for params that are not the model's.
      ValueError: for an implementation that is unknown.
    """
    model = _with_params(model, params)
    if isinstance(model, Rematerialising):
        model.remat = remat
    attend = _attend(model.cache_spec, tree, implementation)
    positions = jnp.asarray(tree.plan.positions)
    hidden, _ = model(jnp.asarray(tree.tokens), positions, None, attend)
    found = _log_probs(model, hidden, jnp.asarray(tree.previous), jnp.asarray(tree.tokens))
    found = jnp.where(_fits(model, tree), found, jnp.nan)
    return found.at[jnp.asarray(tree.places)].get(mode="fill", fill_value=0)


def _with_params(model: DecoderModel, params: Any) -> DecoderModel:
    """The model with other weights."""
    from flax import nnx

    graphdef, state = nnx.split(model)
    values = [jnp.asarray(value) for value in matching_values(params, named_leaves(state))]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), values))


def _fits(model: DecoderModel, tree: TokenTree) -> Bool[Array, ""]:
    """Whether the model has all tokens and positions of a tree."""
    tokens, positions = jnp.asarray(tree.tokens), jnp.asarray(tree.plan.positions)
    return (tokens.max() < model.vocab_size) & (positions.max() < model.max_positions)


def _attend(spec: CacheSpec, tree: TokenTree, implementation: str | None) -> Attend:
    """Attention within the tree; there is no pool."""

    def attend(pool, layer, q, k, v):
        how = {"scale": spec.scale, "softcap": spec.softcap, "implementation": implementation}
        sizes = spec.window_sizes(layer)
        windows = None if sizes is None else HeadWindows(*sizes)
        return tree_attention(q, k, v, tree.plan, windows=windows, **how), pool

    return attend


def _log_probs(
    model: DecoderModel,
    hidden: Float[Array, "T E"],
    previous: Int32[Array, " T"],
    tokens: Int32[Array, " T"],
) -> Float32[Array, " T"]:
    """Of each token behind the one that it follows, a block at a time, forward and backward; the
    logits of a block none of which is asked for are not computed."""

    def of_some(block: tuple[Int32[Array, " R"], Int32[Array, " R"]]) -> Float32[Array, " R"]:
        before, targets = block
        logits = model.logits(jnp.take(hidden, before, axis=0, mode="clip"))
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1)

    # Around the branch: what a branch keeps would be kept for every block.
    @jax.checkpoint
    def of_block(block: tuple[Int32[Array, " R"], Int32[Array, " R"]]) -> Float32[Array, " R"]:
        asked = jnp.any(block[0] < len(hidden))
        return lax.cond(asked, of_some, lambda _: jnp.zeros(BLOCK_TOKENS, jnp.float32), block)

    blocks = (array.reshape(-1, BLOCK_TOKENS) for array in (previous, tokens))
    return lax.map(of_block, tuple(blocks)).reshape(-1)
