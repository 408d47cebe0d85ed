"""What a row draws depends on no other row, to the last bit, where sums are batch-invariant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.device.backend import row_sums_for
from jax_chunkattn.sampling import RowSampling, SamplingParams, log_probabilities, sample
from pallas_kernels.implementations import BATCH_INVARIANT, NATIVE
from tests.interpreted import skip_unless_there

ROWS = 64


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("vocabulary", [251, 1000])
def test_nucleus_and_log_probabilities_at_the_very_edge(vocabulary):
    """XLA computes the exponentials of many rows otherwise than those of few."""
    skip_unless_there(NATIVE)
    row_sums = row_sums_for(BATCH_INVARIANT)
    rng = np.random.default_rng(vocabulary)
    logits = jnp.asarray(rng.standard_normal((ROWS, vocabulary)) * 2, jnp.float32)
    weights = np.sort(np.asarray(row_sums.softmax(logits)), axis=1)[:, ::-1]
    edges = weights.cumsum(axis=1, dtype=np.float32)[:, 3]  # as likely as the likeliest four
    params = [
        SamplingParams(1, temperature=1, top_p=min(1.0, float(edge)), seed=row)
        for row, edge in enumerate(edges)
    ]
    rows = jax.tree.map(jnp.asarray, RowSampling.stack(params, ROWS))

    @jax.jit
    def run(logits, rows):
        positions = jnp.zeros(len(logits), jnp.int32)
        tokens = sample(logits, rows, positions, row_sums=row_sums)
        asked = jnp.full(len(logits), 3, jnp.int32)
        found = log_probabilities(logits, tokens, asked, row_sums=row_sums)
        return row_sums.softmax(logits), tokens, found.chosen, found.top_values

    together = run(logits, rows)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = run(logits[one], jax.tree.map(lambda values, one=one: values[one], rows))
        for mine, all_rows in zip(alone, together, strict=True):
            np.testing.assert_array_equal(mine, all_rows[one])
