"""Attention in float64, and a plain one in the kernel's own dtype: what errors are measured by.

An implementation may be off by twice what the plain one is, the rule of flash-attention's tests.
The plain one rounds to its dtype after every operation, as a framework would, and accumulates its
products in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pallas_kernels.windows import Window

TOLERANCE = 2.0
LEAST_ERROR = 2e-7  # that is forgiven: some last places of a float32 number near 1


@dataclass(frozen=True)
class Expected:
    """What some queries should get.

    Attributes:
      where: (query, KV head) of each.
      exact: [len(where), G, D] in float64.
      naive_error: largest absolute error of the plain implementation.
    """

    where: list[tuple[int, int]]
    exact: np.ndarray
    naive_error: float

    @property
    def allowed(self) -> float:
        return TOLERANCE * self.naive_error + LEAST_ERROR

    def error(self, output: np.ndarray) -> float:
        """Largest absolute error of output [T, Hq, D]; infinite when anything is not a number."""
        if not np.isfinite(output.astype(np.float32)).all():
            return float("inf")
        group, dim = self.exact.shape[1:]
        heads = output.reshape(len(output), -1, group, dim).astype(np.float64)
        got = np.stack([heads[query, head] for query, head in self.where])
        return float(np.abs(got - self.exact).max())


def expected(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    most: int,
    scale: float | None = None,
    softcap: float | None = None,
    windows: Sequence[Window | None] | None = None,
) -> Expected:
    """Attention of q [T, Hq, D], query t over the first `lengths[t]` tokens of `tables[t]`.

    keys and values are one layer of the pool, [Hkv, N, C, D]. Up to `most` pairs of a query and a
    KV head are computed, evenly spread, the first and the last among them. `scale` and `softcap`
    are those of `chunk_attention`. `windows` are those of the KV heads; None: all see all.
    """
    kv_heads, dim = len(keys), keys.shape[-1]
    how = (dim**-0.5 if scale is None else scale, softcap)
    grouped = q.reshape(len(q), kv_heads, -1, dim)
    pairs = [(query, head) for query in range(len(tables)) for head in range(kv_heads)]
    chosen = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int)
    where = [pairs[index] for index in chosen]
    exact, error = [], 0.0
    for query, head in where:
        table, length = np.asarray(tables[query]), lengths[query]
        k = keys[head, table].reshape(-1, dim)[:length]
        v = values[head, table].reshape(-1, dim)[:length]
        window = windows[head] if windows is not None else None
        if window is not None:
            position = np.arange(length)
            seen = (position < window.sinks) | (position >= length - window.size)
            k, v = k[seen], v[seen]
        right = _softmax_attention(grouped[query, head], k, v, *how)
        plain = _plain_attention(grouped[query, head], k, v, *how)
        exact.append(right)
        error = max(error, float(np.abs(plain.astype(np.float64) - right).max()))
    return Expected(where, np.stack(exact), error)


def _softmax_attention(q, k, v, scale: float, softcap: float | None) -> np.ndarray:
    scores = q.astype(np.float64) @ k.astype(np.float64).T * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ v.astype(np.float64) / weights.sum(axis=-1, keepdims=True)


def _plain_attention(q, k, v, scale: float, softcap: float | None) -> np.ndarray:
    dtype = q.dtype

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    q, k, v = (rounded(x) for x in (q, k, v))
    scores = rounded(rounded(q @ k.T) * rounded(np.float32(scale)))
    if softcap is not None:
        cap = rounded(np.float32(softcap))
        scores = rounded(cap * rounded(np.tanh(rounded(scores / cap))))
    weights = rounded(np.exp(rounded(scores - scores.max(axis=-1, keepdims=True))))
    total = rounded(weights.sum(axis=-1, keepdims=True, dtype=np.float32))
    return rounded(rounded(weights / total) @ v)
