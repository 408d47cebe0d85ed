"""A small random decoder, and the same decoder run without any cache."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from jax_chunkattn.planning.planner import bucket
from models.decoder import Decoder
from models.dense_attention import empty_pool, run_dense

CONTEXT = 512
MIN_CONTEXT = 128


@functools.cache
def toy_model() -> Decoder:
    return models.load("random:tiny").model


@functools.cache
def _split():
    return nnx.split(toy_model())


def greedy_without_cache(prompt, max_tokens, stop_tokens=()):
    """Each token from a forward pass over the whole sequence, in dense causal attention."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(int(_run(tokens, CONTEXT)[len(tokens) - 1].argmax()))
        if tokens[-1] in stop_tokens:
            break
    return tokens[len(prompt) :]


@functools.lru_cache(maxsize=2048)
def logits_without_cache(tokens: tuple[int, ...]) -> np.ndarray:
    """Of what follows each of `tokens [T]`, by one pass in dense causal attention: `[T, V]`."""
    return np.asarray(_run(tokens, bucket(len(tokens), MIN_CONTEXT)))[: len(tokens)]


def log_probabilities_without_cache(tokens: tuple[int, ...]) -> np.ndarray:
    """Natural logarithms of the probabilities of what follows `tokens`, in float64: `[V]`."""
    logits = logits_without_cache(tokens)[-1].astype(np.float64)
    return logits - np.logaddexp.reduce(logits)


def _run(tokens, context):
    """Logits `[context, V]` of tokens and of padding behind them."""
    graphdef, state = _split()
    padded = jnp.asarray(np.pad(tokens, (0, context - len(tokens))), jnp.int32)
    pool = empty_pool(toy_model().cache_spec, context)
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
