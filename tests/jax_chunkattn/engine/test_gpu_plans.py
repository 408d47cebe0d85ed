"""An engine with plans made for a GPU, run by an implementation that takes any plan."""

from __future__ import annotations

import pytest

from jax_chunkattn import CacheConfig, Engine, PlannerOptions, SamplingParams
from jax_chunkattn.planning.options import PACKINGS
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, toy_model


def gpu_engine(packing, num_sms=132, **options):
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
    return Engine(toy_model(), cache, planner=planner, implementation="reference", **options)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.slow
def test_tokens_equal_those_of_a_model_without_a_cache(packing):
    prompts = token_tree((1, 137), (2, 40), (3, 21)) + token_tree((1, 200), seed=1)
    engine = gpu_engine(packing, num_sms=1)
    for output in engine.generate(prompts, SamplingParams(max_tokens=20)):
        assert list(output.samples[0].tokens) == greedy_without_cache(prompts[output.index], 20)
    assert engine.stats.plan is not None
    assert engine.stats.plan.packing == packing
    assert "chunk reads saved, an estimated" in engine.stats.plan_decision


def test_steps_that_change_nothing_in_the_tree_plan_nothing():
    engine = gpu_engine("cost", steps_per_call=4)
    for prompt in token_tree((1, 33), (3, 1)):
        engine.submit(prompt, SamplingParams(max_tokens=40))
    plans_by_calls = {}
    while engine.step():
        plans_by_calls[engine.stats.calls] = engine.stats.plans
    # 34 tokens at first, and room is made for the tokens of a call that is on its way and of the
    # next: three chunks hold 48, so the fourth is needed for the fourth call.
    assert [plans_by_calls[calls] for calls in (1, 2, 3, 4)] == [1, 1, 1, 2]
