"""SmolLM2 through tree, pool, plan and kernels, against transformers on the same file.

`tests/models/make_golden.py` made the golden file, and says how.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, Engine, PlannerOptions, SamplingParams, allocate_pool
from jax_chunkattn.device.decode_loop import decode_attend
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.prefill import prefill_attend
from jax_chunkattn.device.programs import SplitModel
from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.prefill import Segment, pack_segments

pytestmark = pytest.mark.optimised

GOLDEN = Path(__file__).parents[1] / "models" / "golden_smollm2.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def prompts(golden):
    return [golden[f"prompt_{i}"].tolist() for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_forty_greedy_tokens_equal_those_of_transformers(smollm2, golden, prompts, chunk_size):
    """Three of the prompts share a system prompt, so the plan has shared and private parts."""
    engine = Engine(
        smollm2.model,
        CacheConfig(80, chunk_size),
        planner=PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1),
    )
    for output in engine.generate(prompts, SamplingParams(max_tokens=40)):
        assert list(output.samples[0].tokens) == golden[f"greedy_{output.index}"].tolist()
    assert engine.stats.prompts.hit + engine.stats.prompts.copied > 100
    assert engine.stats.plan_decision.startswith("shared: ")


@pytest.mark.slow
def test_logits_of_the_chunked_path_agree_with_transformers(smollm2, golden, prompts):
    """All but each prompt's last token by prefill, the last by a decode step."""
    split = SplitModel.of(smollm2.model)
    pool = allocate_pool(smollm2.model.cache_spec, CacheConfig(64, 16))
    shared = list(range(4))  # the first 64 tokens, the same in the first three prompts
    tables = [
        (shared if index < 3 else []) + list(range(10 * index + 4, 10 * index + 14))
        for index in range(4)
    ]
    assert prompts[0][:64] == prompts[1][:64] == prompts[2][:64]
    segments = [
        Segment(prompt[begin:-1], table, begin=begin, end=len(prompt) - 1, write_from=begin)
        for prompt, table, begin in zip(prompts, tables, [0, 64, 64, 0], strict=True)
    ]
    lengths = [len(prompt) - 1 for prompt in prompts]
    batch = pack_segments(segments, num_tokens=512, chunk_size=16, num_chunks=64)
    plan, summary = plan_decode(
        tables,
        lengths,
        chunk_size=16,
        num_chunks=64,
        options=PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1),
    )
    assert summary.shared

    @jax.jit
    def run(leaves, pool, batch, plan, tokens, lengths):
        model = split.merge(leaves)
        spec = model.cache_spec
        attend = prefill_attend(spec, pool, batch.plan, None)
        _, pool = model(batch.tokens, batch.positions, pool, attend)
        rows = DecodeRows(plan, jnp.arange(len(lengths)), lengths, lengths > 0)
        attend = decode_attend(spec, pool, rows, None)
        hidden, _ = model(tokens, lengths, pool, attend)
        return model.logits(hidden)

    last = jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    logits = np.asarray(run(split.leaves, pool, batch, plan, last, lengths))
    for index in range(4):
        expected = golden[f"last_logits_{index}"]
        assert np.abs(logits[index, golden["logit_ids"]] - expected).max() < 1e-3
        assert logits[index].argmax() == golden[f"argmax_{index}"][-1]
