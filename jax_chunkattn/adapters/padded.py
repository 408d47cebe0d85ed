"""Prompts, answers and seeds as arrays of equal rows, which trainers compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jax_chunkattn.engine.outputs import Completion
from jax_chunkattn.sampling.seeds import fork_seed


@dataclass(frozen=True)
class Answer:
    """Tokens, and the log-probability of each if they are known."""

    tokens: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, completion: Completion, ends: Sequence[int]) -> Answer:
        """What was answered, without the one of `ends` that ended it."""
        tokens = list(completion.tokens)
        if completion.finish_reason == "stop" and tokens[-1] in ends:
            tokens.pop()
        logprobs = [one.chosen for one in completion.logprobs]
        return cls(tokens, logprobs[: len(tokens)])

    def behind(self, prompt: Sequence[int]) -> Answer:
        """The same with its prompt before it, whose log-probabilities are 0."""
        return Answer([*prompt, *self.tokens], [0.0] * len(prompt) + self.logprobs)

    def padded_logprobs(self, width: int) -> list[float]:
        """With zeros behind them, so many in all."""
        return self.logprobs + [0.0] * (width - len(self.logprobs))


def padded_prompts(
    prompts: Sequence[Sequence[int]], width: int | None, pad_id: int
) -> Int32[np.ndarray, "B P"]:
    """Prompts with padding before them, `width` tokens each, or the next power of two above the
    longest where that is longer, or for None."""
    longest = max(map(len, prompts), default=0)
    if width is None or width < longest:
        width = 1 << max(0, longest - 1).bit_length()
    return padded(prompts, width, pad_id, left=True)


def padded(
    rows: Sequence[Sequence[int]], width: int, pad_id: int, *, left: bool
) -> Int32[np.ndarray, "B W"]:
    """Rows of `width` tokens each, with padding on one side."""
    array = np.full((len(rows), width), pad_id, np.int32)
    for row, tokens in zip(array, rows, strict=True):
        row[width - len(tokens) if left else 0 :][: len(tokens)] = tokens
    return array


def without_left_padding(row: Int32[np.ndarray, " W"], pad_id: int) -> Int32[np.ndarray, " T"]:
    """The tokens of a row from its first that is no padding."""
    return row[int(np.argmax(row != pad_id)) :] if (row != pad_id).any() else row[:0]


def without_right_padding(row: Int32[np.ndarray, " W"], pad_id: int) -> Int32[np.ndarray, " T"]:
    """The tokens of a row up to its last that is no padding."""
    return without_left_padding(row[::-1], pad_id)[::-1]


def runs(prompts: Sequence[list[int]], most: int) -> list[tuple[list[int], int]]:
    """Each prompt once, and how often it comes in a row, `most` times at most."""
    counted: list[tuple[list[int], int]] = []
    for prompt in prompts:
        if counted and counted[-1][0] == prompt and counted[-1][1] < most:
            counted[-1] = prompt, counted[-1][1] + 1
        else:
            counted.append((prompt, 1))
    return counted


def distinct_seeds(seed: Any, number: int) -> list[int | None]:
    """So many seeds made of one, the first that itself if it is a number.

    Args:
      seed: a number, a key of JAX, old or new, or None, of which only None can be made.
    """
    if seed is None:
        return [None] * number
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    values = np.asarray(seed)
    if values.ndim:
        digest = blake2b(values.tobytes(), digest_size=4).digest()
        first = int.from_bytes(digest, "little")
    else:
        first = int(values) % 2**32
    # Not as samples of one request have theirs: those of other runs would be the same.
    return [fork_seed(first, index) if index else first for index in range(number)]
