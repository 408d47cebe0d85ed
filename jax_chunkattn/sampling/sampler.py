"""Choosing the next token on the device, every row by its own rules and its own seed.

What no row of a batch asks for is not computed: it lies in a branch that is not taken. What a row
does not ask for leaves its numbers exactly as they were, so a row's choice depends on its own
logits, parameters and position and never on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_chunkattn.sampling.row_sums import IN_XLA, RowSums
from jax_chunkattn.sampling.rows import NO_BIAS, RowSampling, TokenCounts

# Logits divided by less overflow, so that lower temperatures are 0. Lower top-p are this: a device
# may take the smallest float32 numbers for zero.
_SMALLEST = 1e-30

NO_CHOICE = -2  # in place of a token, where logits are no numbers to choose by


def sample(
    logits: Float[Array, "B V"],
    rows: RowSampling,
    positions: Int32[Array, " B"],
    counts: Callable[[], TokenCounts] | None = None,
    *,
    row_sums: RowSums = IN_XLA,
) -> Int32[Array, " B"]:
    """The token of each row, to stand at `positions`.

    A batch that is greedy in every row, without biases and penalties, costs an argmax and nothing
    more. A row in which a logit is NaN or infinitely large, or all are minus infinity, has no
    likeliest token and no distribution: it gets `NO_CHOICE`.

    Args:
      logits: of the token at `positions`.
      rows: B rows of parameters.
      positions: a row's random numbers depend on its seed and on this.
      counts: gives the tokens of each row's prompt and answer, `[B, V]`; called where penalties are
        computed, so that what it computes is computed only then. Without it there are no penalties.
      row_sums: adds up the probabilities that top-p goes by.
    """
    biased = jnp.any(rows.bias_tokens != NO_BIAS)
    penalised = jnp.any(_penalised(rows)) if counts is not None else jnp.bool_(False)
    drawing = rows.temperature >= _SMALLEST

    def likeliest(logits):
        return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)

    def choose(logits):
        logits = _adjust(logits.astype(jnp.float32), rows, biased, penalised, counts)
        greedy = likeliest(logits)
        # Outside the branch, so that they take the place of the logits, which no branch reads.
        scaled = logits / jnp.where(drawing, rows.temperature, 1)[:, None]

        def draw():
            left = _truncate(scaled, rows, row_sums)
            return jnp.where(drawing, _draw(left, rows.seed, positions), greedy)

        return lax.cond(jnp.any(drawing), draw, lambda: greedy), greedy

    def choose_likeliest(logits):
        greedy = likeliest(logits)
        return greedy, greedy

    adjusted = biased | penalised | jnp.any(drawing)
    tokens, greedy = lax.cond(adjusted, choose, choose_likeliest, logits)
    # The largest of a row's logits is NaN if any is; biases and penalties make no number infinite.
    largest = jnp.take_along_axis(logits, greedy[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.where(jnp.isfinite(largest), tokens, NO_CHOICE)


def _adjust(logits, rows: RowSampling, biased, penalised, counts):
    """Logits with biases added, then penalties applied."""

    def add_biases(logits):
        row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        return logits.at[row, rows.bias_tokens].add(
            rows.bias_values, mode="drop", unique_indices=True
        )

    # XLA lets the branches below write over what they are given. Were that the caller's logits, it
    # would copy them for every batch, greedy ones too, before the branch that leads here is chosen.
    # Adding -0.0 makes a new array, here, and changes nothing.
    logits = logits + biased.astype(jnp.float32) * -0.0
    logits = lax.cond(biased, add_biases, lambda x: x, logits)
    if counts is None:
        return logits
    return lax.cond(penalised, lambda x: _penalise(x, rows, counts()), lambda x: x, logits)


def _penalised(rows: RowSampling):
    return (
        (rows.repetition_penalty != 1)
        | (rows.presence_penalty != 0)
        | (rows.frequency_penalty != 0)
    )


def _penalise(logits, rows: RowSampling, counts: TokenCounts):
    """Repetition penalty (arXiv 1909.05858, section 4.1), then OpenAI's frequency and presence."""
    generated = counts.generated > 0
    factor = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(counts.prompt | generated, repeated, logits)
    logits -= rows.frequency_penalty[:, None] * counts.generated.astype(jnp.float32)
    return logits - jnp.where(generated, rows.presence_penalty[:, None], 0)


def _draw(logits, seeds, positions):
    """One token a row, by adding Gumbel noise and taking the largest."""

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    noisy = logits + jax.vmap(noise)(seeds, positions)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def _truncate(logits: Float32[Array, "B V"], rows: RowSampling, row_sums: RowSums):
    """Logits, minus infinity outside top-k, top-p and min-p.

    Each of the three keeps what is at or above a threshold of its row: only these leave a branch.
    """

    def top_k(threshold):
        number = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[-1])
        kept = _threshold(logits, jnp.ones_like(logits), number.astype(jnp.float32), row_sums)
        return jnp.maximum(threshold, kept)

    def top_p(threshold):
        left = jnp.where(logits >= threshold[:, None], logits, -jnp.inf)
        share = jnp.maximum(rows.top_p, _SMALLEST)
        kept = _threshold(logits, row_sums.softmax(left), share, row_sums)
        return jnp.where(rows.top_p < 1, jnp.maximum(threshold, kept), threshold)

    def min_p(threshold):
        likeliest = logits.max(axis=-1)
        kept = jnp.minimum(likeliest + jnp.log(rows.min_p), likeliest)
        return jnp.maximum(threshold, kept)

    threshold = jnp.full(logits.shape[0], -jnp.inf, jnp.float32)
    for asked, narrow in (
        (rows.top_k > 0, top_k),
        (rows.top_p < 1, top_p),
        (rows.min_p > 0, min_p),
    ):
        threshold = lax.cond(jnp.any(asked), narrow, lambda threshold: threshold, threshold)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def _threshold(values, weights, target, row_sums: RowSums):
    """The largest number at or above which a row's weights add up to at least the target.

    Found bit by bit, 32 sums over the vocabulary, where a sort would move it some 16 times. When
    all weights together stay below the target, it is minus infinity.
    """

    def decide(index, key):
        candidate = key | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        above = row_sums.total(jnp.where(values >= _number(candidate)[:, None], weights, 0))
        return jnp.where(above >= target, candidate, key)

    return _number(lax.fori_loop(0, 32, decide, jnp.zeros(values.shape[:1], jnp.uint32)))


def _number(key):
    """The float32 number at a place among all of them: uint32 keys sort as their numbers do."""
    key = jnp.maximum(key, jnp.uint32(0x007FFFFF))  # minus infinity; below it are NaNs
    sign = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(jnp.where(key >= sign, key ^ sign, ~key), jnp.float32)
