"""A session with plans made for a GPU, run by an implementation that takes any plan."""

from __future__ import annotations

import pytest

from jax_chunkattn import CacheConfig, DecodeSession, PlannerOptions, SamplingParams
from jax_chunkattn.planning.options import PACKINGS
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, toy_model


def gpu_session(packing, num_sms=132, **options):
    """The toy model's 4 query and 2 KV heads; one processor, and all work counts: sharing pays."""
    planner = PlannerOptions.for_gpu(
        num_sms=num_sms,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        chunk_size=16,
        dtype_bytes=4,
        packing=packing,
    )
    cache = CacheConfig(200, 16)
    return DecodeSession(toy_model(), cache, planner=planner, implementation="xla", **options)


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_equal_those_of_a_model_without_a_cache(packing):
    prompts = token_tree((1, 137), (2, 40), (3, 21)) + token_tree((1, 200), seed=1)
    decoding = gpu_session(packing, num_sms=1)
    requests = decoding.generate(prompts, SamplingParams(max_tokens=20))
    expected = [greedy_without_cache(prompt, 20) for prompt in prompts]
    assert [request.tokens for request in requests] == expected
    assert decoding.stats.plan is not None
    assert decoding.stats.plan.packing == packing
    assert "chunk reads saved, an estimated" in decoding.stats.plan_decision


def test_steps_that_change_nothing_in_the_tree_plan_nothing():
    decoding = gpu_session("cost", steps_per_call=4)
    decoding.add(token_tree((1, 33), (3, 1)), SamplingParams(max_tokens=40))
    for _ in range(3):  # 34 tokens at first, room for 46 in the third: all in three chunks
        version = decoding.tree.version
        decoding.step()
        assert decoding.tree.version == version
        assert decoding.stats.plans == 1
    decoding.step()  # room for 50
    assert decoding.stats.plans == 2
