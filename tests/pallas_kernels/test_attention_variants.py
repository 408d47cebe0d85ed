"""Attention and writes are what they are by definition, compiled or not, and whether what they are
given lies on the host or on the device."""

from __future__ import annotations

from functools import partial

import chex
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.planning.prefill import QUERY_TILE
from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels import chunk_attention, prefill_attention, write_kv
from pallas_kernels.specs import AttentionCase
from tests import oracle
from tests.pallas_kernels.test_prefill_attention import pack
from tests.variants import VariantsTestCase, every_way

TOLERANCE = 2e-6  # that of prefill attention: plain float32 attention is off by up to 8e-7


class AttentionVariants(VariantsTestCase):
    @every_way
    def test_rows_attend_as_the_oracle_does(self):
        inputs = case_inputs(AttentionCase("1,4_96,16", 4, 2, 16, chunk_size=16), layers=3)
        problem = inputs.q, inputs.keys[2], inputs.values[2], inputs.tables, inputs.lengths
        exact = oracle.decode_attention(*problem)
        attend = self.variant(partial(chunk_attention, layer=2))
        got = attend(inputs.q, inputs.keys, inputs.values, inputs.plan, inputs.lengths)
        chex.assert_trees_all_close(got, exact, rtol=0, atol=TOLERANCE)

    @every_way
    def test_new_tokens_attend_as_the_oracle_does(self):
        segments, batch, num_chunks = pack([(20, 40), (0, 5)], 16, 32)
        random = np.random.default_rng(1)
        q = random.standard_normal((32, 4, 24), np.float32)
        keys, values = random.standard_normal((2, 1, 2, num_chunks, 16, 24), np.float32)
        reads = [(s.chunk_ids, end) for s in segments for end in range(s.begin + 1, s.end + 1)]
        exact = np.zeros(q.shape)
        scores = {"scale": 1.0, "softcap": 5.0}
        tables, lengths = zip(*reads, strict=True)
        exact[: len(reads)] = oracle.decode_attention(
            q[: len(reads)], keys[0], values[0], tables, lengths, **scores
        )
        attend = self.variant(partial(prefill_attention, query_tile=QUERY_TILE, **scores))
        got = attend(q, keys, values, batch.plan)
        chex.assert_trees_all_close(got, exact, rtol=0, atol=TOLERANCE)

    @every_way
    def test_tokens_are_written_where_the_host_or_the_device_says(self):
        """Pool and new tokens are on the device. A chunk of N or more drops its token, values are
        made finite, and everything else stays."""
        random = np.random.default_rng(0)
        keys, values = random.standard_normal((2, 2, 2, 3, 4, 8), np.float32)
        k, v = random.standard_normal((2, 5, 2, 8), np.float32)
        v[1, 0, :3] = np.nan, np.inf, -np.inf
        chunks, offsets = np.array([[2, 0, 3, 2, 9], [3, 0, 1, 0, 2]], np.int32)

        @self.variant
        def write(keys, values, k, v, chunks, offsets):
            keys, values, k, v = map(jnp.asarray, (keys, values, k, v))
            return write_kv(keys, values, k, v, chunks, offsets, layer=1)

        got = write(keys, values, k, v, chunks, offsets)
        largest = float(np.finfo(np.float32).max)
        finite = np.nan_to_num(v, nan=0.0, posinf=largest, neginf=-largest)
        expected = keys.copy(), values.copy()
        for token, (chunk, offset) in enumerate(zip(chunks, offsets, strict=True)):
            if chunk < 3:
                expected[0][1, :, chunk, offset] = k[token]
                expected[1][1, :, chunk, offset] = finite[token]
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
        chex.assert_trees_all_equal(got, expected)
