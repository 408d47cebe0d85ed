"""The attention that libraries bring: JAX's own, and PyTorch's where it is installed.

Both get every row's keys and values in one piece, head-major: the layout in which each is fastest
on CPU, or nearly. In [B, T, Hkv, D], its own, JAX's takes 13 times as long with one query head per
KV head (32 rows of 1024 tokens, 32 heads of 128, 2 cores).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from experiments.harness import timing
from experiments.harness.environment import usable_cpus


@jax.jit
def jax_dot_product_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv T D"],
    values: Float[Array, "B Hkv T D"],
    lengths: Int32[Array, " B"],
) -> Float[Array, "B Hq D"]:
    """`jax.nn.dot_product_attention` of one query per row over its first `lengths[b]` tokens."""
    keys, values = (jnp.swapaxes(x, 1, 2) for x in (keys, values))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        attend = jax.nn.dot_product_attention
        return attend(q[:, None], keys, values, key_value_seq_lengths=lengths)[:, 0]


def torch_missing() -> str | None:
    """Why PyTorch's attention cannot be called here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; its CPU build will do: pip install torch"
    return None


def matrix_products(
    size: int, dtype: str, *, seed: int
) -> dict[str, Callable[[], jax.Array | np.ndarray]]:
    """A product of two square matrices, by XLA and, where they are the CPU's, by PyTorch too."""
    products: dict[str, Callable[[], jax.Array | np.ndarray]] = {
        "XLA": timing.matmul(size, dtype, seed=seed)
    }
    if torch_missing() is None and jax.default_backend() == "cpu":
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(usable_cpus())
        drawn = np.random.default_rng(seed).standard_normal((2, size, size), np.float32)
        left, right = (torch.from_numpy(one).to(getattr(torch, dtype)) for one in drawn)
        products["PyTorch"] = lambda: (left @ right).float().numpy()
    return products


def torch_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv T D"],
    values: Float[Array, "B Hkv T D"],
    lengths: np.ndarray,
) -> Callable[[], np.ndarray]:
    """`torch.nn.functional.scaled_dot_product_attention` on the same memory, on the CPU.

    PyTorch may use as many threads as XLA. The query heads of a KV head are given as that many
    queries: on 2 cores this takes 0.5 to 0.8 of the time that `enable_gqa` takes.

    Returns:
      a call without arguments; it returns [B, Hq, D] in float32, or in float64.
    """
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(usable_cpus())
    batch, num_heads, head_dim = q.shape
    kv_heads, tokens = keys.shape[1:3]
    # PyTorch sees JAX's memory, and does not write to it.
    theirs: list[Any] = [torch.from_dlpack(array) for array in (q, keys, values)]
    queries, contexts = theirs[0], theirs[1:]
    queries = queries.reshape(batch, kv_heads, num_heads // kv_heads, head_dim)
    mask = None
    if (lengths == lengths[0]).all():
        contexts = [context[:, :, : int(lengths[0])] for context in contexts]
    else:
        visible = np.arange(tokens)[None] < lengths[:, None]
        mask = torch.from_numpy(visible)[:, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention

    def call() -> np.ndarray:
        output = attend(queries, *contexts, attn_mask=mask)
        return output.reshape(batch, num_heads, head_dim).float().numpy()

    return call
