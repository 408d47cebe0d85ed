"""Attention in float64 NumPy, from block tables alone: it knows nothing of plans or tiles."""

from __future__ import annotations

import numpy as np


def attend(q, k, v, scale=None, softcap=None):
    """q [Hq, D], k and v [Hkv, T, D] -> [Hq, D], in float64."""
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[0] // k.shape[0]
    out = np.zeros(q.shape)
    for head, query in enumerate(q.astype(np.float64)):
        scores = k[head // group].astype(np.float64) @ query * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[head // group].astype(np.float64) / weights.sum()
    return out


def context(pool, table, length):
    """The first `length` tokens of the chunks in `table`: pool [Hkv, N, C, D] -> [Hkv, T, D]."""
    return pool[:, table].reshape(pool.shape[0], -1, pool.shape[-1])[:, :length]


def decode_attention(q, keys, values, tables, lengths, scale=None, softcap=None):
    """One query a row over that row's chunks: q [B, Hq, D], keys [Hkv, N, C, D] -> [B, Hq, D]."""
    out = np.zeros(q.shape)
    for row, table in enumerate(tables):
        k, v = (context(pool, table, lengths[row]) for pool in (keys, values))
        out[row] = attend(q[row], k, v, scale, softcap)
    return out
