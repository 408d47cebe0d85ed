"""Sampling one row in plain NumPy, from the definitions, and the rows to try it on.

Values are multiples of small powers of two, so that float32 holds every intermediate logit exactly
and ties are ties whatever the order of operations.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jax_chunkattn.sampling import SamplingParams

VOCABULARY = 24


class OnTheEdge(Exception):
    """Rounding decides whether a token is kept."""


@dataclass(frozen=True)
class Row:
    """One row of a batch: what the model says, what is asked, and what came before."""

    logits: np.ndarray
    params: SamplingParams
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    position: int = 0


@jax.jit
def _noise(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, (VOCABULARY,), jnp.float32)


def expected_token(row: Row) -> int:
    """Raises OnTheEdge where float32 may rightly choose otherwise."""
    params = row.params
    logits = adjusted(row)
    if params.temperature == 0:
        return int(np.argmax(logits))
    logits = logits / np.float32(params.temperature)
    kept = within_min_p(logits, within_top_p(logits, within_top_k(logits, params), params), params)
    noise = np.asarray(_noise(np.uint32(params.seed or 0), np.int32(row.position)))
    return int(np.argmax(np.where(kept, logits + noise, -np.inf)))


def adjusted(row: Row) -> np.ndarray:
    params = row.params
    logits = row.logits.astype(np.float32)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in {*row.prompt, *row.generated}:
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token, count in Counter(row.generated).items():
        logits[token] -= count * params.frequency_penalty + params.presence_penalty
    return logits


def within_top_k(logits, params):
    if not 0 < params.top_k < len(logits):
        return np.full(len(logits), True)
    return logits >= np.sort(logits)[-params.top_k]


def within_top_p(logits, kept, params):
    if params.top_p == 1:
        return kept
    weights = np.where(kept, np.exp(logits.astype(np.float64) - logits.max()), 0)
    order = np.argsort(-logits, kind="stable")
    total = np.cumsum(weights[order] / weights.sum())
    if np.abs(total - params.top_p).min() < 1e-5:
        raise OnTheEdge
    last = order[np.searchsorted(total, params.top_p)]
    return kept & (logits >= logits[last])


def within_min_p(logits, kept, params):
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    if 0 < params.min_p < 1 and np.abs(ratio - params.min_p).min() < 1e-5:
        raise OnTheEdge
    return kept & (ratio >= params.min_p)


def _quarters(low, high):
    return st.integers(4 * low, 4 * high).map(lambda quarters: quarters / 4)


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=8).map(tuple)

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 10, VOCABULARY, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
    seed=st.integers(0, 2**32 - 1),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-4, 1)),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.0, 2.0, 4.0]),
    presence_penalty=_quarters(-2, 2),
    frequency_penalty=_quarters(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), _quarters(-100, 100), max_size=4),
)

ROWS = st.builds(
    Row,
    logits=st.lists(_quarters(-4, 4), min_size=VOCABULARY, max_size=VOCABULARY).map(
        lambda logits: np.array(logits, np.float32)
    ),
    params=PARAMS,
    prompt=TOKENS,
    generated=TOKENS,
    position=st.integers(0, 2**20),
)
