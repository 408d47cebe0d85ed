"""What a request must answer, from a model without a cache: no pool, tree, scheduler or plan.

Every token of an answer must be the one that the sampler, given one row, takes from the logits of a
dense forward pass over all the tokens before it. One causal pass gives the logits at every position
at once; that each token is right behind those before it makes, by induction, the whole answer that
of a run without a cache.

The logits differ from the engine's by rounding, so where two tokens are nearly as likely either may
be chosen. A token that is not the sampler's counts as a near tie if it is the sampler's once its
logit is raised by `ROUNDING` and all others are lowered by it. `Agreement` counts these, for tests
to bound.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_chunkattn.engine.requests import TokenLogprobs
from jax_chunkattn.sampling import RowSampling, SamplingParams, TokenCounts, sample
from models.decoder import Decoder
from tests.jax_chunkattn.engine.behind import logits_behind
from tests.jax_chunkattn.toy import logits_without_cache, toy_model

MAX_ANSWER = 64  # tokens; answers are padded to it, so that the sampler is compiled once
ROUNDING = 2e-5  # of a logit or log-probability of about 10


@dataclass
class Agreement:
    """How well answers agreed with the oracle.

    Attributes:
      model: that gave them.
      prefix: keys and values `[L, Hkv, m, D]` that all come behind; None where nothing does.
      tokens: compared.
      near_ties: of those, where rounding decided otherwise.
      logprobs: compared.
      largest_error: of a log-probability.
    """

    model: Decoder = field(default_factory=toy_model, repr=False)
    prefix: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    tokens: int = 0
    near_ties: int = 0
    logprobs: int = 0
    largest_error: float = 0.0

    @property
    def virtual(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else self.prefix[0].shape[2]

    def logits(self, tokens: tuple[int, ...]) -> np.ndarray:
        """Of what follows each of them, `[T, V]`."""
        if self.prefix is None:
            return logits_without_cache(tokens, self.model)
        return logits_behind(self.prefix, tokens, self.model)

    def check_tokens(
        self, prompt: Sequence[int], params: SamplingParams, tokens: Sequence[int], given: int = 0
    ) -> None:
        """Asserts that the sampler chooses each of `tokens`, but for the first `given`."""
        sequence = (*prompt, *tokens)
        logits = self.logits(sequence[:-1])
        expected = _choices(params, prompt, tokens, logits, self.virtual)
        self.tokens += len(tokens) - given
        for index in range(given, len(tokens)):
            if expected[index] == tokens[index]:
                continue
            nudged = logits - ROUNDING
            nudged[len(prompt) + index - 1, tokens[index]] += 2 * ROUNDING
            again = _choices(params, prompt, tokens, nudged, self.virtual)
            assert again[index] == tokens[index], (
                f"token {index} of {list(tokens)} behind {list(prompt)} with {params} "
                f"is {expected[index]} without a cache"
            )
            self.near_ties += 1

    def check_logprobs(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        given: int = 0,
    ) -> None:
        """Asserts that they are the model's own, but for the first `given`, and as many as asked
        for."""
        if params.logprobs is None:
            assert not logprobs
            return
        assert len(logprobs) == len(tokens)
        logits = self.logits((*prompt, *tokens)[:-1])[len(prompt) - 1 :]
        for index in range(given, len(tokens)):
            expected = logits[index] - np.logaddexp.reduce(logits[index].astype(np.float64))
            top = logprobs[index].top
            named = [(tokens[index], logprobs[index].chosen), *top]
            errors = [abs(value - expected[token]) for token, value in named]
            likeliest = np.sort(expected)[::-1][: params.logprobs]
            errors += [abs(v - best) for (_, v), best in zip(top, likeliest, strict=True)]
            self.logprobs += len(named)
            self.largest_error = max(self.largest_error, *map(float, errors))
            assert max(errors) < ROUNDING, f"{logprobs[index]} of {list(prompt)} {list(tokens)}"


class Ending(NamedTuple):
    """Where an answer ends, and why: its last token's index plus one, and its text."""

    reason: str
    num_tokens: int
    text: str


def ending(
    tokens: Sequence[int], params: SamplingParams, stop_tokens: Collection[int], given: int = 0
) -> Ending | None:
    """The end of an answer of bytes, or None; the first `given` tokens do not end it."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(stop_tokens))
    for count in range(given + 1, len(tokens) + 1):
        if tokens[count - 1] in stops:
            return Ending("stop", count, text_of(tokens[: count - 1]))
        text = text_of(tokens[:count])
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in params.stop]
        found = [(end, begin) for end, begin in found if begin >= 0]
        if found:
            return Ending("stop", count, text[: min(found)[1]])
        if count == params.max_tokens:
            return Ending("length", count, text)
    return None


def text_of(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def _choices(
    params: SamplingParams,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logits: np.ndarray,
    virtual: int,
) -> list[int]:
    """The sampler's token in the place of each of `tokens`, behind those before it."""
    assert len(tokens) <= MAX_ANSWER, f"{len(tokens)} tokens"
    vocabulary = toy_model().vocab_size
    seen = np.zeros((1, vocabulary), np.bool_)
    seen[0, list(prompt)] = True
    one_hot = np.zeros((MAX_ANSWER, 1, vocabulary), np.int32)
    one_hot[np.arange(len(tokens)), 0, list(tokens)] = 1
    behind = np.zeros((MAX_ANSWER, 1, vocabulary), np.float32)
    behind[: len(tokens), 0] = logits[len(prompt) - 1 :]
    positions = virtual + len(prompt) + np.arange(MAX_ANSWER, dtype=np.int32)[:, None]
    generated = np.cumsum(one_hot, axis=0, dtype=np.int32) - one_hot
    chosen = _sample_each(RowSampling.stack([params], 1), behind, positions, seen, generated)
    return np.asarray(chosen)[: len(tokens)].tolist()


@jax.jit
def _sample_each(row: RowSampling, logits, positions, prompt, generated):
    """One row at a time, as a batch of one."""

    def choose(one):
        logits, position, generated = one
        counts = TokenCounts(jnp.asarray(prompt), generated)
        return sample(logits, row, position, lambda: counts)[0]

    return lax.map(choose, (logits, positions, generated))
