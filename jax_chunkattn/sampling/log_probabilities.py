"""How likely the model itself found the chosen tokens, and which it found likeliest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_chunkattn.sampling.params import MAX_LOGPROBS
from jax_chunkattn.sampling.row_sums import IN_XLA, RowSums
from pallas_kernels.plans import HostOrDevice

NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities, likeliest token first. Letters: L = `MAX_LOGPROBS`.

    Row b holds what it asks for (`log_probabilities`). A row that asks for no report has 0 in
    `chosen`; columns a row did not ask for, or beyond the vocabulary, have the token `NO_TOKEN` and
    the value 0.
    """

    chosen: Float32[Array, " B"]
    top_tokens: Int32[Array, "B L"]  # ties by the smaller id
    top_values: Float32[Array, "B L"]

    @classmethod
    def empty(cls, rows: int) -> Logprobs:
        """Of rows that ask for no report."""
        return cls(
            jnp.zeros(rows, jnp.float32),
            jnp.full((rows, MAX_LOGPROBS), NO_TOKEN, jnp.int32),
            jnp.zeros((rows, MAX_LOGPROBS), jnp.float32),
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, at one position.

    Attributes:
      chosen: of the token that was chosen. NaN where a fork begins with tokens for which its parent
        did not ask, or with another one that its parent did not list.
      top: the likeliest tokens and theirs, the likeliest first; as many as were asked for, or
        all when the vocabulary has fewer.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def at(cls, values: Logprobs, step: int, row: int, number: int) -> TokenLogprobs:
        """Of the token that step `step` of a call chose for a row, with the `number` likeliest.

        values: of the call, on the host, [K, B].
        """
        tokens, logprobs = values.top_tokens[step, row], values.top_values[step, row]
        number = min(number, int(np.count_nonzero(tokens != NO_TOKEN)))
        top = zip(tokens[:number].tolist(), logprobs[:number].tolist(), strict=True)
        return cls(float(values.chosen[step, row]), tuple(top))

    def of(self, token: int) -> TokenLogprobs:
        """As if `token` had been chosen; NaN when it is not among the likeliest that are known."""
        return TokenLogprobs(dict(self.top).get(token, math.nan), self.top)


def log_probabilities(
    logits: Float[Array, "B V"],
    tokens: Int32[Array, " B"],
    asked: Int32[HostOrDevice, " B"],
    *,
    row_sums: RowSums = IN_XLA,
) -> Logprobs:
    """Log-probabilities of the chosen `tokens`, and of each row's `asked[b]` likeliest; of a row
    that asks for -1 neither.

    They are those of the model's own distribution, the softmax of `logits`, whatever bias, penalty,
    temperature or truncation the tokens were chosen with. Free when no row asks. A token outside
    the vocabulary is taken for the nearest in it.
    """
    batch, vocabulary = logits.shape
    asked = jnp.asarray(asked)
    unasked = Logprobs.empty(batch)
    likeliest = (unasked.top_tokens, unasked.top_values)

    def report():
        scores = logits.astype(jnp.float32)
        normaliser = row_sums.log_normaliser(scores)
        chosen = jnp.take_along_axis(scores, tokens[:, None], axis=-1, mode="clip")[:, 0]
        chosen = jnp.where(asked >= 0, chosen - normaliser, 0)

        def rank():
            columns = min(MAX_LOGPROBS, vocabulary)
            values, indices = lax.top_k(scores, columns)
            values -= normaliser[:, None]
            reported = jnp.arange(columns, dtype=jnp.int32)[None, :] < asked[:, None]
            return (
                likeliest[0].at[:, :columns].set(jnp.where(reported, indices, NO_TOKEN)),
                likeliest[1].at[:, :columns].set(jnp.where(reported, values, 0)),
            )

        return chosen, *lax.cond(jnp.any(asked > 0), rank, lambda: likeliest)

    def nothing():
        return unasked.chosen, *likeliest

    return Logprobs(*lax.cond(jnp.any(asked >= 0), report, nothing))
