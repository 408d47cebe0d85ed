"""Calls that update the device do what they say, compiled or not, and whether rows, slots and plans
lie on the host or on the device. Pool and token counts are on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, CacheSpec, SamplingParams, allocate_pool, plan_decode
from jax_chunkattn.device.decode_loop import NOTHING, decode_steps
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.request_table import (
    DeviceState,
    RequestTable,
    RowState,
    copy_chunks,
    place_counts,
    place_rows,
)
from jax_chunkattn.planning.prefill import Segment, pack_segments
from jax_chunkattn.sampling import RowSampling
from tests import oracle
from tests.jax_chunkattn.engine.engines import SHARE_ALL
from tests.variants import VariantsTestCase, every_way, variants

SLOTS, VOCABULARY, CHUNKS = 4, 32, 5
RANDOM = np.random.default_rng(0)
EMBEDDING, POSITIONS = RANDOM.standard_normal((2, 32, 32), np.float32)
UNEMBEDDING = RANDOM.standard_normal((16, VOCABULARY), np.float32)


class OneAttention:
    """A decoder of one attention, whose queries, keys and values are parts of its input."""

    cache_spec = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, num_heads=2)
    vocab_size = VOCABULARY
    max_positions = len(POSITIONS)

    def __call__(self, tokens, positions, pool, attend):
        x = jnp.asarray(EMBEDDING)[tokens] + jnp.asarray(POSITIONS)[positions]
        q, k, v = x[:, :16].reshape(-1, 2, 8), x[:, None, 16:24], x[:, None, 24:]
        attended, pool = attend(pool, jnp.int32(0), q, k, v)
        return attended.reshape(-1, 16), pool

    def logits(self, hidden):
        return jnp.matmul(hidden, UNEMBEDDING, precision="highest")


def greedy(prompt, number):
    """Its tokens and the logarithms of their probabilities, in float64 and without a pool."""
    tokens, logprobs = list(prompt), []
    while len(logprobs) < number:
        x = EMBEDDING[tokens] + POSITIONS[: len(tokens)]
        hidden = oracle.attend(x[-1, :16].reshape(2, 8), x[None, :, 16:24], x[None, :, 24:])
        logits = hidden.ravel() @ UNEMBEDDING.astype(np.float64)
        tokens.append(int(logits.argmax()))
        logprobs.append(logits.max() - np.logaddexp.reduce(logits))
    return tokens[len(prompt) :], logprobs


def empty_state(rows=((0, 0, 0),) * SLOTS, params=()):
    """A state whose slots hold these rows, by `RowState`'s fields."""
    pool = allocate_pool(OneAttention.cache_spec, CacheConfig(CHUNKS, 16))
    rows = RowState(*np.array(rows, np.int32).T.copy())
    return DeviceState(pool, RequestTable.of(rows, params, VOCABULARY))


def with_pool_on_device(state):
    """The state as `state` has it, with pool and counts on the device, where they always are."""
    pool, counts = jax.tree.map(jnp.asarray, (state.pool, state.table.counts))
    return DeviceState(pool, dataclasses.replace(state.table, counts=counts))


class DeviceVariants(VariantsTestCase):
    # Not the other two: here every argument comes from the host, and a compilation takes seconds.
    @variants(with_jit=True, without_device=True)
    @pytest.mark.slow
    def test_prompts_are_computed_and_decoded_as_without_a_pool(self):
        """Two rows behind a shared chunk, of which one freezes a step before the other."""
        shared = list(range(16))
        prompts, tables = [[*shared, 7, 30, 7, 2], [*shared, 21, 4]], [[0, 1], [0, 2]]
        segments = [
            Segment(prompts[0], tables[0], begin=0, end=20, write_from=0),
            Segment(prompts[1][16:], tables[1], begin=16, end=18, write_from=16),
        ]
        batch = pack_segments(segments, num_tokens=32, chunk_size=16, num_chunks=CHUNKS)
        plan, summary = plan_decode(
            tables, [20, 18], chunk_size=16, num_chunks=CHUNKS, options=SHARE_ALL
        )
        assert summary.shared
        frozen = (0, 0, 0)
        params = [SamplingParams(logprobs=0)] * SLOTS
        state = empty_state([frozen, (0, 18, 3), frozen, (0, 20, 4)], params)
        how: dict[str, Any] = {"implementation": "reference"}

        @self.variant
        def generate(state, slots, batch, plan):
            state = with_pool_on_device(state)
            state, first = prefill_step(OneAttention(), state, slots, batch, **how)
            state, others = decode_steps(OneAttention(), state, slots, plan, num_steps=3, **how)
            return state.table, first, others

        table, first, others = generate(state, np.array([3, 1], np.int32), batch, plan)
        tokens, logprobs = zip(*map(greedy, prompts, (4, 3)), strict=True)
        chosen = np.concatenate([first.tokens[None], others.tokens])
        expected = np.array([tokens[0], [*tokens[1], NOTHING]], np.int32).T
        chex.assert_trees_all_equal(chosen, expected, strict=True)
        found = np.concatenate([first.logprobs.chosen[None], others.logprobs.chosen])
        chex.assert_trees_all_close(
            (found[:, 0], found[:3, 1]), tuple(map(np.array, logprobs)), rtol=0, atol=1e-5
        )
        rows = [frozen, (tokens[1][-1], 20, 0), frozen, (tokens[0][-1], 23, 0)]
        chex.assert_trees_all_equal(table.rows, empty_state(rows).table.rows)
        generated = np.zeros((SLOTS, VOCABULARY), np.int32)
        for slot, row in ((3, 0), (1, 1)):
            np.add.at(generated[slot], tokens[row], 1)
        chex.assert_trees_all_equal(table.counts.generated, generated)

    @every_way
    def test_rows_are_placed_in_their_slots_and_have_seen_what_is_said(self):
        before = [SamplingParams(temperature=1.0, seed=slot) for slot in range(SLOTS)]
        state = empty_state([(slot, 10 * slot, 9) for slot in range(SLOTS)], before)
        ones = jax.tree.map(jnp.ones_like, state.table.counts)
        state = dataclasses.replace(state, table=dataclasses.replace(state.table, counts=ones))
        rows = RowState(*np.array([[5, 6, 7], [50, 60, 70], [1, 2, 3]], np.int32))
        params = [SamplingParams(logit_bias={3: 1.0}, logprobs=2), SamplingParams(top_k=4)]
        prompt, generated = np.arange(VOCABULARY) < 9, np.arange(VOCABULARY, dtype=np.int32)

        @self.variant
        def place(state, slots, rows, sampling, slot, prompt, generated):
            state = place_rows(with_pool_on_device(state), slots, rows, sampling)
            return place_counts(state, slot, prompt, generated).table

        nowhere = SLOTS
        slots = np.array([2, 0, nowhere], np.int32)
        sampling = RowSampling.stack([*params, SamplingParams()], 3)
        got = place(state, slots, rows, sampling, np.array(2, np.int32), prompt, generated)
        expected = empty_state(
            [(6, 60, 2), (1, 10, 9), (5, 50, 1), (3, 30, 9)],
            [params[1], before[1], params[0], before[3]],
        ).table
        counts = jax.tree.map(np.array, expected.counts)
        counts.prompt[[1, 3]], counts.generated[[1, 3]] = True, 1
        counts.prompt[2], counts.generated[2] = prompt, generated
        expected = dataclasses.replace(expected, counts=counts)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
        chex.assert_trees_all_equal(got, expected)

    @every_way
    def test_chunks_are_copied_within_the_pool(self):
        """In a cycle, which needs all to be read before any is written; N and more is nowhere."""
        state = empty_state()
        numbers = jax.tree.map(lambda x: RANDOM.standard_normal(x.shape, np.float32), state.pool)
        state = dataclasses.replace(state, pool=numbers)

        @self.variant
        def copy(state, sources, destinations):
            return copy_chunks(with_pool_on_device(state), sources, destinations).pool

        got = copy(state, *np.array([[2, 4, 1, 0], [4, 1, 2, CHUNKS]], np.int32))
        chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x[:, :, [0, 4, 1, 3, 2]], numbers))
