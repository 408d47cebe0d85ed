"""A small random decoder, and the same decoder run without any cache."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from models.decoder import Decoder
from tests.models.dense_attention import empty_pool, run_dense

CONTEXT = 512


@functools.cache
def toy_model() -> Decoder:
    return models.load("random:tiny").model


@functools.cache
def _split():
    return nnx.split(toy_model())


def greedy_without_cache(prompt, max_tokens, stop_tokens=()):
    """Each token from a forward pass over the whole sequence, in dense causal attention."""
    graphdef, state = _split()
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        padded = jnp.asarray(np.pad(tokens, (0, CONTEXT - len(tokens))), jnp.int32)
        pool = empty_pool(toy_model().cache_spec, CONTEXT)
        positions = jnp.arange(CONTEXT, dtype=jnp.int32)
        logits, _ = run_dense(graphdef, state, padded, positions, pool)
        tokens.append(int(logits[len(tokens) - 1].argmax()))
        if tokens[-1] in stop_tokens:
            break
    return tokens[len(prompt) :]


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
