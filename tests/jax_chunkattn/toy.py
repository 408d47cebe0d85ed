"""A small random decoder, and the same decoder run without any cache."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import models
from jax_chunkattn.planning.planner import bucket
from models.decoder import Decoder
from models.dense_attention import empty_pool, run_dense
from models.head_patterns import HeadPattern, with_pattern
from pallas_kernels.windows import Window, WindowMap

MIN_CONTEXT = 128


@functools.cache
def toy_model() -> Decoder:
    return models.load("random:tiny").model


def mesh_of(devices: int) -> Mesh:
    """The first of the devices, along `tp`."""
    return Mesh(np.array(jax.devices()[:devices]), ("tp",))


@functools.cache
def toy_model_on(devices: int | None, *, unroll: bool = False, **sizes: int) -> Decoder:
    """The toy model, or one like it with other sizes, over a mesh if there are to be `devices`."""
    mesh = None if devices is None else mesh_of(devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "tiny", replace(models.preset("tiny"), **sizes))
        return models.load("random:tiny", mesh=mesh, unroll=unroll).model


@functools.cache
def laid_over(model: Decoder, devices: int) -> Decoder:
    """The toy model, or one of its weights whose heads have windows, over so many devices."""
    laid = models.load("random:tiny", mesh=mesh_of(devices)).model
    laid.cache_spec = model.cache_spec
    return laid


WIDER = {"num_heads": 16, "num_kv_heads": 8}
"""Heads for eight devices."""


WINDOWS = WindowMap((None, Window(21), Window(9, sinks=20)), ((0, 1), (2, 0)))
"""Longer and shorter than a chunk of 16 tokens, with sinks that end in a chunk."""


@functools.cache
def layered_model() -> Decoder:
    """The same weights as `toy_model`; each layer has a window, the second one shorter than a
    chunk."""
    model = models.load("random:tiny").model
    windows = WindowMap((Window(21), Window(11, sinks=2)), ((0, 0), (1, 1)))
    model.cache_spec = replace(model.cache_spec, windows=windows)
    return model


@functools.cache
def windowed_model() -> Decoder:
    """The same weights; each KV head of a layer has another window."""
    model = models.load("random:tiny").model
    model.cache_spec = replace(model.cache_spec, windows=WINDOWS)
    return model


@functools.cache
def reweighted(model: Decoder) -> Decoder:
    """The same decoder with other weights."""
    graphdef, state = _split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.flip(x, axis=-1) * 1.25, state))


PATTERN = HeadPattern.of([[0.9, 0.1], [0.2, 0.8]], sinks=19, recent=25)
"""Of one retrieval head in each layer; what streaming heads see begins and ends within chunks."""


@functools.cache
def patterned_model() -> Decoder:
    """The same weights; half of the KV heads are streaming heads."""
    return with_pattern(toy_model(), PATTERN, 0.5)


@functools.cache
def _split(model):
    return nnx.split(model)


def greedy_without_cache(prompt, max_tokens, stop_tokens=(), model=None):
    """Each token from a forward pass over the whole sequence, in dense causal attention."""
    return list(_greedy(tuple(map(int, prompt)), max_tokens, tuple(stop_tokens), model))


@functools.cache  # tests of many files ask for the same answers
def _greedy(prompt, max_tokens, stop_tokens, model):
    tokens, context = list(prompt), bucket(len(prompt) + max_tokens, MIN_CONTEXT)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(int(_run(tokens, context, model)[len(tokens) - 1].argmax()))
        if tokens[-1] in stop_tokens:
            break
    return tokens[len(prompt) :]


@functools.lru_cache(maxsize=2048)
def logits_without_cache(tokens: tuple[int, ...], model: Decoder | None = None) -> np.ndarray:
    """Of what follows each of `tokens [T]`, by one pass in dense causal attention: `[T, V]`."""
    return np.asarray(_run(tokens, bucket(len(tokens), MIN_CONTEXT), model))[: len(tokens)]


def log_probabilities_without_cache(tokens: tuple[int, ...]) -> np.ndarray:
    """Natural logarithms of the probabilities of what follows `tokens`, in float64: `[V]`."""
    logits = logits_without_cache(tokens)[-1].astype(np.float64)
    return logits - np.logaddexp.reduce(logits)


def _run(tokens, context, model=None):
    """Logits `[context, V]` of tokens and of padding behind them."""
    model = model or toy_model()
    graphdef, state = _split(model)
    padded = jnp.asarray(np.pad(tokens, (0, context - len(tokens))), jnp.int32)
    pool = empty_pool(model.cache_spec, context)
    logits, _ = run_dense(graphdef, state, padded, jnp.arange(context, dtype=jnp.int32), pool)
    return logits


def token_tree(*levels, seed=0):
    """Prompts of a tree: `levels` are (children of each node, tokens of each child)."""
    random = np.random.default_rng(seed)
    prompts: list[list[int]] = [[]]
    for children, length in levels:
        prompts = [
            prompt + random.integers(0, toy_model().vocab_size, length).tolist()
            for prompt in prompts
            for _ in range(children)
        ]
    return prompts
