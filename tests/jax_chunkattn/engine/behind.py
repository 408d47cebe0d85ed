"""Learned prefixes for the toy model, and what it says behind one without any cache."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_chunkattn import Engine, EngineStats
from models.dense_attention import dense_attend
from tests.jax_chunkattn.toy import toy_model


@functools.cache
def prefix_of(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[L, Hkv, m, D]`, as large as the model's own."""
    spec, random = toy_model().cache_spec, np.random.default_rng(seed)
    shape = (spec.num_layers, spec.num_kv_heads, tokens, spec.head_dim)
    keys, values = random.normal(size=(2, *shape)).astype(np.float32)
    return keys, values


def chained(engine: Engine, **seeds: int) -> None:
    """One prefix for all, and behind it one for each name, of these seeds; 16 tokens each."""
    engine.add_prefix("general", *prefix_of(16, 7))
    for name, seed in seeds.items():
        engine.add_prefix(name, *prefix_of(16, seed), after="general")


class BehindPrefix:
    """An engine whose requests all come behind one prefix, which its statistics do not count."""

    def __init__(self, engine: Engine, prefix: tuple[np.ndarray, np.ndarray]):
        self.engine = engine
        self.learned = engine.add_prefix("own", *prefix)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.engine, name)
        argument = {
            "check_request": "prefix",
            "generate": "prefix",
            "pin": "prefix",
            "score": "learned",
            "submit": "prefix",
            "submit_samples": "prefix",
        }.get(name)
        if argument is None:
            return found
        return lambda *args, **kwargs: found(*args, **{**kwargs, argument: "own"})

    @property
    def stats(self) -> EngineStats:
        stats = self.engine.stats
        return replace(stats, pinned=stats.pinned - 1)


def joined(*prefixes: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of several, one behind another."""
    keys, values = (np.concatenate(arrays, axis=2) for arrays in zip(*prefixes, strict=True))
    return keys, values


def logits_behind(prefix, tokens, model=None) -> np.ndarray:
    """Of what follows each of `tokens [T]` behind a prefix, in dense attention: `[T, V]`."""
    virtual, context = prefix[0].shape[2], 256
    held = [np.zeros((len(array), context, *array.shape[1::2]), np.float32) for array in prefix]
    for array, given in zip(held, prefix, strict=True):
        array[:, :virtual] = given.transpose(0, 2, 1, 3)
    padded = np.zeros(context - virtual, np.int32)
    padded[: len(tokens)] = tokens
    graphdef, state = nnx.split(model or toy_model())
    logits = _run(graphdef, state, padded, virtual, tuple(held))
    return np.asarray(logits)[: len(tokens)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(graphdef, state, tokens, virtual, pool):
    model = nnx.merge(graphdef, state)
    positions = virtual + jnp.arange(len(tokens), dtype=jnp.int32)
    attend = dense_attend(positions, model.cache_spec)
    hidden, _ = model(tokens, positions, jax.tree.map(jnp.asarray, pool), attend)
    return model.logits(hidden)


def greedy_behind(prefix, prompt, max_tokens: int, model=None) -> list[int]:
    """Each token from a pass over the whole sequence."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(logits_behind(prefix, tokens, model)[-1].argmax()))
    return tokens[len(prompt) :]
