"""What a codec does to a model's predictions, against the same pass over chunks stored as they are.

Three passages are scored under every codec, each read by the rule that the pool has: a token reads
its own chunk exact, and chunks before it encoded.

  text: windows of a text behind its beginning: KL divergence, perplexity, likeliest tokens.
  answers: what the model itself goes on with, greedily, after pieces of the text: how often the
    codec finds the same next token when both have read the same.
  copies: a text with strings of random tokens hidden in it, and windows that begin as one of the
    strings does: how much of the rest the model finds. Perplexity does not see that a model has
    lost what it read long ago; this does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.quality.config import DEPTHS, SHOWN, STRING
from experiments.quality.scoring import Passage, Scores
from jax_chunkattn import CacheConfig, Engine, SamplingParams, chunks_needed
from models import Decoder

_BLOCK = 256  # tokens whose logits are computed at once


@dataclass(frozen=True)
class Agreement:
    """How two passes over the same tokens compare, each [W, T].

    Attributes:
      divergence: KL(exact || codec) of the distributions of the next token, in nats.
      scores: of the codec's pass.
    """

    divergence: np.ndarray
    scores: Scores


def compare(model: Decoder, exact: np.ndarray, coded: np.ndarray, targets: np.ndarray) -> Agreement:
    """Two passes by their hidden states [W, T, M], with the tokens that follow in the text."""
    divergence, logprobs, greedy = _in_blocks(_compare, model, exact, coded, targets)
    return Agreement(divergence, Scores(logprobs, greedy))


def likeliest(model: Decoder, hidden: np.ndarray) -> np.ndarray:
    """The tokens that hidden states [W, T, M] make likeliest, int32 [W, T]."""
    [greedy] = _in_blocks(_likeliest, model, hidden)
    return greedy


def _in_blocks(function: Callable, model: Decoder, *sides: np.ndarray) -> list[np.ndarray]:
    """What a function finds for each token of `sides`, each [W, T, ...], some tokens at a time."""
    split, shape = nnx.split(model), sides[0].shape[:2]
    count = math.prod(shape)
    blocks = -(-count // _BLOCK)

    def flat(array: np.ndarray) -> np.ndarray:
        array = array.reshape(count, *array.shape[2:])
        return np.pad(array, ((0, blocks * _BLOCK - count), *((0, 0),) * (array.ndim - 1)))

    padded = [flat(array) for array in sides]
    found = [
        function(*split, *(side[at : at + _BLOCK] for side in padded))
        for at in range(0, blocks * _BLOCK, _BLOCK)
    ]
    return [np.concatenate(parts)[:count].reshape(shape) for parts in zip(*found, strict=True)]


@partial(jax.jit, static_argnums=0)
def _likeliest(graphdef, state, hidden):
    logits = nnx.merge(graphdef, state).logits(hidden.astype(_dtype(state)))
    return (jnp.argmax(logits, axis=1).astype(jnp.int32),)


def _dtype(state) -> jnp.dtype:
    return jnp.result_type(*jax.tree.leaves(state))


@partial(jax.jit, static_argnums=0)
def _compare(graphdef, state, exact, coded, targets):
    model = nnx.merge(graphdef, state)
    dtype = _dtype(state)
    logits = model.logits(coded.astype(dtype)).astype(jnp.float32)
    ours = jax.nn.log_softmax(logits)
    theirs = jax.nn.log_softmax(model.logits(exact.astype(dtype)).astype(jnp.float32))
    divergence = (jnp.exp(theirs) * (theirs - ours)).sum(axis=1)
    chosen = jnp.take_along_axis(ours, targets[:, None], axis=1)[:, 0]
    return divergence, chosen, jnp.argmax(logits, axis=1).astype(jnp.int32)


def answer_passage(
    model: Decoder,
    prefix: np.ndarray,
    pieces: np.ndarray,
    num_tokens: int,
    *,
    chunk_size: int,
    dtype: str,
) -> Passage:
    """What the model goes on with, greedily, behind a prefix [P] and each of some pieces [W, T].

    The last `num_tokens` targets of a window are the answer.
    """
    prompts = [[*prefix.tolist(), *piece.tolist()] for piece in pieces]
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    cache = CacheConfig(
        chunks_needed(prompts, num_tokens, chunk_size=chunk_size), chunk_size, dtype
    )
    with Engine(model, cache, max_running=len(prompts), prefill_first=True) as engine:
        answers = [output.samples[0].tokens for output in engine.generate(prompts, params)]
    whole = np.concatenate([pieces, np.array(answers, np.int32)], axis=1)
    return Passage(prefix, whole[:, :-1], whole[:, 1:])


def copy_passage(
    tokens: Sequence[int] | np.ndarray, *, length: int, strings: int, seed: int
) -> Passage:
    """A text of `length` tokens in which strings are hidden, and a window for each.

    So many strings are hidden one after another, with some text between, around each of `DEPTHS`.
    They are of tokens that the text has. A window is its string; targets from `SHOWN` on are to be
    copied.
    """
    random = np.random.default_rng(seed)
    text = np.asarray(tokens[:length], np.int32)
    hidden = random.choice(np.unique(text), (len(DEPTHS) * strings, STRING))
    for begin, string in zip(string_begins(length, strings), hidden, strict=True):
        text[begin : begin + STRING] = string
    return Passage(text, hidden[:, :-1], hidden[:, 1:])


def string_begins(length: int, strings: int) -> list[int]:
    """Where `copy_passage` hides its strings."""
    spacing = 2 * STRING
    begins = []
    for depth in DEPTHS:
        middle = length * depth // 100
        first = min(max(middle - strings * spacing // 2, 0), length - strings * spacing)
        begins += [first + index * spacing for index in range(strings)]
    return begins


def copied(passage: Passage, greedy: np.ndarray) -> list[float]:
    """Share of tokens copied from each of `DEPTHS`, by what a pass found likeliest [W, T]."""
    right = (greedy == passage.targets)[:, SHOWN - 1 :]
    return [float(part.mean()) for part in np.split(right, len(DEPTHS))]
