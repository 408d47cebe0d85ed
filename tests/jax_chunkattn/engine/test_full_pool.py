"""A pool that is too small for all: eviction, preemption, and what can never fit."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn import PoolExhausted, SamplingParams
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree


def test_preempted_requests_pause_and_lose_nothing():
    prompts = token_tree((1, 32), (6, 9))
    engine = make_engine(num_chunks=10, max_running=4, prefill_tokens=32)
    streams = {index: [] for index in range(6)}
    handles = [
        engine.submit(prompt, SamplingParams(50), on_event=streams[index].append)
        for index, prompt in enumerate(prompts)
    ]
    while engine.step():
        engine.check()
    assert engine.stats.preemptions > 0
    for index, handle in enumerate(handles):
        expected = greedy_without_cache(prompts[index], 50)
        assert list(handle.tokens) == expected
        assert [token for event in streams[index] for token in event.tokens] == expected
    assert_all_returned(engine)


def test_a_preempted_sample_draws_the_same_tokens():
    prompts = token_tree((6, 20))
    params = [
        SamplingParams(50, temperature=1.0, seed=seed, repetition_penalty=1.3, logprobs=1)
        for seed in range(6)
    ]
    tight, ample = make_engine(num_chunks=10, prefill_tokens=32), make_engine()
    results = [
        [engine.submit(*each).result() for each in zip(prompts, params, strict=True)]
        for engine in (tight, ample)
    ]
    together = [
        [engine.submit(*each) for each in zip(prompts, params, strict=True)]
        for engine in (tight, ample)
    ]
    tokens = [run(handles) for handles in together]
    assert tokens[0] == tokens[1] == [list(result.tokens) for result in results[0]]
    assert tight.stats.preemptions > 0 == ample.stats.preemptions
    for small, large in zip(*together, strict=True):
        np.testing.assert_allclose(
            [one.chosen for one in small.logprobs],
            [one.chosen for one in large.logprobs],
            atol=1e-4,
        )
    assert_all_returned(tight)


def test_the_oldest_is_never_preempted():
    prompts = token_tree((5, 30))
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    finished = []
    for index, prompt in enumerate(prompts):

        def note(event, index=index):
            if event.finish_reason:
                finished.append(index)

        engine.submit(prompt, SamplingParams(60), on_event=note)
    engine.run()
    assert finished == [0, 1, 2, 3, 4]
    assert engine.stats.preemptions > 0


def test_a_pool_just_large_enough_serves_any_number_of_requests_one_by_one():
    prompts = token_tree((3, 100))
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    assert run([engine.submit(prompt, SamplingParams(61)) for prompt in prompts]) == [
        greedy_without_cache(prompt, 61) for prompt in prompts
    ]
    with pytest.raises(PoolExhausted, match="needs 11 chunks"):
        engine.submit(prompts[0], SamplingParams(62))
    assert_all_returned(engine)


def test_held_requests_give_way_before_running_ones():
    prompts = token_tree((4, 30))
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    held = [engine.submit(prompt, SamplingParams(3), hold=True) for prompt in prompts[:3]]
    assert run(held) == [greedy_without_cache(prompt, 3) for prompt in prompts[:3]]
    assert engine.stats.held == 3
    assert engine.stats.chunks_in_use == 6
    assert run([engine.submit(prompts[3], SamplingParams(90))]) == [
        greedy_without_cache(prompts[3], 90)
    ]
    assert engine.stats.held < 3
    assert engine.stats.preemptions == 0
    for handle in held:
        handle.release()
        handle.release()
    assert_all_returned(engine)


def test_forks_that_wait_for_a_slot_give_way_too():
    """They hold chunks without running; the oldest could otherwise wait for them for ever."""
    prompts = token_tree((2, 30))
    engine = make_engine(num_chunks=10, max_running=1, prefill_tokens=32)
    parent = engine.submit(prompts[0], SamplingParams(20))
    while not parent.tokens:
        engine.step()
    forks = [parent.fork() for _ in range(3)]
    late = engine.submit(prompts[1], SamplingParams(130))
    expected = greedy_without_cache(prompts[0], 20)
    assert run([parent, *forks, late]) == [
        expected,
        expected,
        expected,
        expected,
        greedy_without_cache(prompts[1], 130),
    ]
    assert_all_returned(engine)


def test_the_papers_policy_keeps_nothing():
    prompts = token_tree((1, 64), (2, 5))
    engine = make_engine(retain=False)
    run([engine.submit(prompts[0], SamplingParams(4))])
    assert engine.stats.chunks_cached == 0
    run([engine.submit(prompts[1], SamplingParams(4))])
    assert engine.stats.prompts.hit == 0
    together = [engine.submit(prompt, SamplingParams(4)) for prompt in prompts]
    assert run(together) == [greedy_without_cache(prompt, 4) for prompt in prompts]
    assert engine.stats.prompts.hit == 64
    assert_all_returned(engine)


def test_a_reset_while_requests_run_leaves_nothing_of_them_behind():
    prompts = token_tree((1, 40), (2, 8))
    engine = make_engine()
    engine.pin(prompts[0])
    handles = [engine.submit(prompt, SamplingParams(20)) for prompt in prompts]
    for _ in range(5):
        engine.step()
    engine.reset()
    engine.check()
    assert engine.stats.pinned == 0
    late = engine.submit(prompts[0], SamplingParams(20))
    assert run([*handles, late]) == [
        greedy_without_cache(prompt, 20) for prompt in (*prompts, prompts[0])
    ]
    engine.check()
    engine.reset()
    assert engine.stats.chunks_free == 200
