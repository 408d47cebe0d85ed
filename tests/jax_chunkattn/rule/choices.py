"""What queries choose to read, by the definition: over a whole sequence at once, without a pool, a
plan or steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs import AffineCodec
from pallas_kernels.selection import ChunkSelector


def chunks_seen(selector: ChunkSelector, size: int, q, k, scale: float):
    """Which chunks each token reads in a layer that chooses: bool [T, P].

    Queries are `[T, Hq, D]`, keys `[T, Hkv, D]`; the policy is "scores" or "bounds".
    """
    tokens, _, dim = q.shape
    number = -(-tokens // size)
    chunks = jnp.pad(k, ((0, number * size - tokens), (0, 0), (0, 0)))
    chunks = chunks.reshape(number, size, -1, dim).transpose(2, 0, 1, 3)  # [Hkv, P, C, D]
    grouped = q.reshape(tokens, len(chunks), -1, dim)
    if selector.policy == "scores":
        codec = AffineCodec(4, "tokens")
        keys = codec.decode(codec.encode(chunks))
        scores = jnp.einsum("thgd,hpcd->thgpc", grouped, keys, precision="highest") * scale
        best = scores.max(axis=-1)
    else:
        low = jnp.einsum("thgd,hpd->thgpd", grouped, chunks.min(axis=2), precision="highest")
        high = jnp.einsum("thgd,hpd->thgpd", grouped, chunks.max(axis=2), precision="highest")
        best = jnp.maximum(low, high).sum(axis=-1) * scale
    own = jnp.arange(tokens, dtype=jnp.int32) // size
    before = jnp.arange(number, dtype=jnp.int32)[None] < own[:, None]
    best = jnp.where(before[:, None, None], best, -1e30)
    scores = jax.nn.softmax(best, axis=-1).sum(axis=(1, 2))
    place = jnp.arange(number, dtype=jnp.int32)[None]
    always = (place <= own[:, None]) & (place >= own[:, None] - selector.recent)
    always |= (place < selector.sinks) & (place <= own[:, None])
    ranked = jnp.argsort(jnp.where(before & ~always, -scores, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(ranked, axis=1)
    seen = always | (before & (rank < _wanted(selector, np.arange(tokens) // size)[:, None]))
    first = np.arange(tokens) // selector.refresh * selector.refresh
    return seen[first]


def _wanted(selector: ChunkSelector, own: np.ndarray) -> np.ndarray:
    """How many chunks a query chooses beside those it reads always, by its own chunk."""
    wanted = []
    for chunk in own.tolist():
        always = min(chunk + 1, selector.sinks + selector.recent + 1)
        share = math.ceil(round(selector.keep * (chunk + 1), 6))
        if chunk < selector.whole:
            share = chunk + 1
        wanted.append(min(max(share - always, 1), chunk + 1 - always))
    return np.array(wanted)


def logits_by_the_definition(
    model, selector: ChunkSelector, size: int, tokens, windows=None, prefix=None
):
    """Of what follows each token: `[T, V]`. `prefix` has keys and values `[L, Hkv, m, D]` to read
    in the place of those of the first tokens."""
    spec, positions = model.cache_spec, jnp.arange(len(tokens), dtype=jnp.int32)
    group = spec.num_heads // spec.num_kv_heads
    causal = positions[:, None] >= positions[None]

    def attend(pool, layer, q, k, v):
        scale = q.shape[-1] ** -0.5
        k, v = put_prefix(prefix, layer, k, v)
        seen = chunks_seen(selector, size, q, k, scale)
        dense = jnp.any(jnp.asarray(selector.dense_layers, jnp.int32) == layer)
        seen = jnp.repeat(seen, size, axis=1)[:, : len(tokens)] | dense
        seen = jnp.broadcast_to((seen & causal)[None], (spec.num_kv_heads, *causal.shape))
        if windows is not None:
            of_heads = jnp.asarray(spec.windows.of_heads)[layer]
            by_window = jnp.stack([_in_window(window, positions) for window in windows])
            chooses = jnp.array([window is None for window in windows])[of_heads]
            seen = jnp.where(chooses[:, None, None], seen, by_window[of_heads] & causal[None])
        seen = jnp.repeat(seen, group, axis=0)
        wide = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("thd,shd->hts", q, wide[0], precision="highest") * scale
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("hts,shd->thd", weights, wide[1], precision="highest"), pool

    @jax.jit
    def run(tokens):
        hidden, _ = model(tokens, positions, None, attend)
        return model.logits(hidden)

    return np.asarray(run(jnp.asarray(tokens, jnp.int32)))


def put_prefix(prefix, layer, k, v):
    """Keys and values `[T, Hkv, D]` of a layer with those of a prefix in the first places."""
    if prefix is None:
        return k, v
    given = (jnp.swapaxes(jnp.asarray(array)[layer], 0, 1) for array in prefix)
    return tuple(own.at[: len(new)].set(new) for own, new in zip((k, v), given, strict=True))


def _in_window(window, positions):
    if window is None:
        return jnp.ones((len(positions), len(positions)), bool)
    near = positions[:, None] - positions[None] < window.size
    return near | (positions[None] < window.sinks)
