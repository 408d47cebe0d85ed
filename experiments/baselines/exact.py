"""Attention in float64 NumPy, from block tables: what every implementation is held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exact_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    rows: Sequence[int],
    kv_heads: Sequence[int],
    layer: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Attention of some rows, for the query heads of some KV heads.

    Args:
      q: [B, Hq, D].
      keys, values: the pool, [L, Hkv, N, C, D].
      tables: the chunks of every row; lengths: its tokens.
      rows, kv_heads: which to compute, R rows and H heads.
      layer: the layer of the pool.
      scale, softcap: as in `chunk_attention`.

    Returns:
      [R, H, G, D] in float64.
    """
    batch, num_heads, head_dim = q.shape
    grouped = q.astype(np.float64).reshape(batch, keys.shape[1], -1, head_dim)
    grouped = grouped * (head_dim**-0.5 if scale is None else scale)
    output = np.empty((len(rows), len(kv_heads), num_heads // keys.shape[1], head_dim))
    for i, row in enumerate(rows):
        for j, head in enumerate(kv_heads):

            def context(pool: np.ndarray, row: int = row, head: int = head) -> np.ndarray:
                tokens = pool[layer, head, tables[row]].reshape(-1, head_dim)
                return tokens[: lengths[row]].astype(np.float64)

            scores = grouped[row, head] @ context(keys).T
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            output[i, j] = weights @ context(values) / weights.sum(axis=-1, keepdims=True)
    return output
