from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn import (
    CacheConfig,
    DecodeSession,
    InvalidRequest,
    PlannerOptions,
    PoolExhausted,
    SamplingParams,
    chunks_needed,
)
from tests.interpreted import implementations
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, toy_model

SHARE_ALL = PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)


def session(num_chunks=200, chunk_size=16, **options):
    options.setdefault("planner", SHARE_ALL)
    return DecodeSession(toy_model(), CacheConfig(num_chunks, chunk_size), **options)


def tokens_of(requests):
    return [request.tokens for request in requests]


def run_in_waves(session, prompts, sampling):
    """Requests join three at a time while others run, and leave when they finish."""
    waiting, running, done = list(enumerate(prompts)), {}, {}
    while waiting or running:
        wave, waiting = waiting[:3], waiting[3:]
        if wave:
            indices, batch = zip(*wave, strict=True)
            added = session.add(batch, [sampling[index] for index in indices])
            running |= dict(zip(indices, added, strict=True))
        session.step()
        session.tree.check()
        for index, request in list(running.items()):
            if request.finish_reason:
                session.release(running.pop(index))
                session.tree.check()
                done[index] = request
    return [done[index] for index in range(len(prompts))]


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_tokens_equal_those_of_a_model_without_a_cache(chunk_size, sharing):
    """Three levels of sharing, unequal lengths, chunk boundaries crossed, rows that come and go."""
    prompts = token_tree((1, 137), (2, 40), (3, 21)) + token_tree((1, 64), (1, 1), seed=1)
    prompts += [prompts[0][:128], prompts[0][:130], prompts[0]]
    sampling = [SamplingParams(max_tokens=8 + 7 * (i % 4)) for i in range(len(prompts))]
    decoding = session(chunk_size=chunk_size, sharing=sharing, steps_per_call=5)
    finished = run_in_waves(decoding, prompts, sampling)
    for prompt, params, request in zip(prompts, sampling, finished, strict=True):
        assert request.tokens == greedy_without_cache(prompt, params.max_tokens)
        assert request.finish_reason == "length"
    assert decoding.tree.in_use_count == 0
    reused = decoding.stats.prefill_tokens_reused
    assert reused > 500 if sharing else reused == 0


@implementations
def test_each_implementation_decodes_the_same(implementation):
    prompts = token_tree((1, 70), (4, 9))
    decoding = session(num_chunks=30, planner=None, implementation=implementation)
    requests = decoding.generate(prompts, SamplingParams(max_tokens=12))
    assert decoding.backend.decode == decoding.backend.prefill == implementation
    assert tokens_of(requests) == [greedy_without_cache(prompt, 12) for prompt in prompts]


def test_a_common_prefix_of_requests_that_arrive_together_is_computed_once():
    prompts = token_tree((1, 100), (5, 10))
    decoding = session()
    decoding.generate(prompts, SamplingParams(max_tokens=1))
    assert decoding.stats.prefill_tokens_computed == 110 + 4 * (110 - 96)
    assert decoding.stats.prefill_tokens_reused == 4 * 96


def test_what_was_computed_stays_for_later_requests():
    [prompt] = token_tree((1, 100))
    decoding = session()
    [first] = decoding.generate([prompt], SamplingParams(max_tokens=40))
    computed = decoding.stats.prefill_tokens_computed
    longer = prompt + first.tokens[:30] + [3]
    [second] = decoding.generate([longer], SamplingParams(max_tokens=5))
    assert decoding.stats.prefill_tokens_computed - computed == 131 - 128
    assert second.tokens == greedy_without_cache(longer, 5)


@pytest.mark.parametrize("length", [16, 64, 128])
def test_a_prompt_that_is_cached_as_a_whole_still_gets_its_next_token(length):
    [prompt] = token_tree((1, length))
    decoding = session()
    [first] = decoding.generate([prompt], SamplingParams(max_tokens=4))
    [again] = decoding.generate([prompt], SamplingParams(max_tokens=4))
    assert decoding.stats.prefill_tokens_computed == length + 1
    assert again.tokens == first.tokens == greedy_without_cache(prompt, 4)


def test_unshared_requests_hold_and_compute_everything_themselves():
    prompts = token_tree((1, 64), (4, 16))
    shared, unshared = session(), session(sharing=False)
    for decoding in (shared, unshared):
        decoding.generate(prompts, SamplingParams(max_tokens=16))
    per_chunk = shared.cache.bytes_per_chunk(toy_model().cache_spec)
    assert per_chunk == 2 * 2 * 2 * 16 * 16 * 4
    # 64 + 16 prompt tokens and 15 generated ones: 4 chunks in common, 2 of a row's own.
    assert shared.stats.kv_bytes_held == (4 + 4 * 2) * per_chunk
    assert shared.stats.kv_bytes_unshared == 4 * 6 * per_chunk
    assert unshared.stats.kv_bytes_held == unshared.stats.kv_bytes_unshared == 4 * 6 * per_chunk
    assert unshared.stats.prefill_tokens_computed == 4 * 80
    assert shared.stats.plan_decision.startswith("shared: ")
    assert unshared.stats.plan_decision.startswith("unshared: ")
    assert (shared.stats.shared_tokens, unshared.stats.shared_tokens) == (64, 0)


def test_stop_tokens_end_a_request_and_are_its_last_token():
    [prompt] = token_tree((1, 33))
    free = greedy_without_cache(prompt, 30)
    stop = free[11]
    decoding = session(stop_tokens=[stop, 999], steps_per_call=4)
    [request] = decoding.generate([prompt], SamplingParams(max_tokens=30))
    assert request.tokens == free[: free.index(stop) + 1]
    assert request.finish_reason == "stop"


def test_steps_per_call_changes_nothing_but_the_number_of_calls():
    prompts = token_tree((1, 60), (3, 5))
    results = [
        tokens_of(session(steps_per_call=k).generate(prompts, SamplingParams(max_tokens=21)))
        for k in (1, 3, 64)
    ]
    assert results[0] == results[1] == results[2]


def test_a_plan_is_made_only_when_the_tree_changes():
    [prompt] = token_tree((1, 17))
    decoding = session(chunk_size=64, steps_per_call=4)
    decoding.generate([prompt], SamplingParams(max_tokens=40))
    assert decoding.stats.plans == 1


def test_sampling_depends_on_the_seed_and_on_nothing_else_in_the_batch():
    prompts = token_tree((1, 40), (4, 6))
    sampling = [SamplingParams(20, temperature=1.0, seed=seed) for seed in (1, 2, 3, 4)]
    together = tokens_of(session().generate(prompts, sampling))
    alone = [
        session(sharing=False).generate([prompt], params)[0].tokens
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    assert together == alone
    other_seed = session().generate(prompts[:1], SamplingParams(20, temperature=1.0, seed=9))
    assert other_seed[0].tokens != together[0]


def assert_untouched(decoding):
    assert decoding.tree.free_count == decoding.cache.num_chunks
    assert decoding.stats.prefill_tokens_computed == 0
    decoding.tree.check()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "message"),
    [
        ([], 4, InvalidRequest, "prompt 1 is empty"),
        ([5, 256], 4, InvalidRequest, "prompt 1 has token id 256 at position 1; .* 0 to 255"),
        ([-1], 4, InvalidRequest, "token id -1 at position 0"),
        ([0.5], 4, InvalidRequest, "must be a sequence of token ids"),
        (["a"], 4, InvalidRequest, "must be a sequence of token ids"),
        ([1] * 1000, 25, InvalidRequest, "1000 tokens and asks for 25 more; .* 1024 positions"),
        ([1] * 200, 4, PoolExhausted, "needs 13 chunks of 16 tokens to finish; the pool has 12"),
    ],
)
def test_a_bad_request_is_refused_before_anything_changes(prompt, max_tokens, error, message):
    decoding = session(num_chunks=12)
    with pytest.raises(error, match=message):
        decoding.add([[1, 2, 3], prompt], SamplingParams(max_tokens=max_tokens))
    assert_untouched(decoding)


def test_requests_that_together_exceed_the_pool_are_refused_and_leave_nothing_behind():
    decoding = session(num_chunks=12)
    with pytest.raises(PoolExhausted):
        decoding.add(token_tree((4, 50)), SamplingParams(max_tokens=4))
    assert_untouched(decoding)
    with pytest.raises(PoolExhausted, match=r"can come to need 15 more chunks .* 0 of 12"):
        decoding.add(token_tree((3, 64)), SamplingParams(max_tokens=81))
    assert_untouched(decoding)


def test_running_requests_always_have_room_to_finish():
    prompts = token_tree((1, 32), (2, 16))
    needed = chunks_needed(prompts, 50, chunk_size=16)
    decoding = session(num_chunks=needed)
    running = decoding.add(prompts[:1], SamplingParams(max_tokens=50))
    with pytest.raises(PoolExhausted):
        decoding.add([prompts[1] + [7] * 16], SamplingParams(max_tokens=50))
    running += decoding.add(prompts[1:], SamplingParams(max_tokens=50))
    while any(request.finish_reason is None for request in running):
        decoding.step()
    assert decoding.tree.in_use_count == needed
    assert tokens_of(running) == [greedy_without_cache(prompt, 50) for prompt in prompts]


def test_chunks_needed_without_sharing_is_the_sum_of_all():
    prompts = token_tree((1, 64), (3, 8))
    assert chunks_needed(prompts, 9, chunk_size=16) == 4 + 3
    assert chunks_needed(prompts, 9, chunk_size=16, sharing=False) == 3 * 5


def test_an_interrupted_prefill_leaves_nothing_to_match():
    [prompt] = token_tree((1, 700))
    decoding = session()

    def interrupt(progress):
        if progress.done >= 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoding.add([prompt], SamplingParams(max_tokens=4), on_progress=interrupt)
    decoding.tree.check()
    assert decoding.tree.in_use_count == 0
    assert decoding.tree.match(prompt).num_tokens == 512
    [request] = decoding.generate([prompt[:400]], SamplingParams(max_tokens=4))
    assert request.tokens == greedy_without_cache(prompt[:400], 4)


def test_generate_releases_its_requests_when_it_is_interrupted():
    def interrupt(progress):
        if progress.phase == "decode":
            raise KeyboardInterrupt

    decoding = session()
    with pytest.raises(KeyboardInterrupt):
        decoding.generate(token_tree((3, 20)), on_progress=interrupt)
    assert decoding.tree.in_use_count == 0
    decoding.tree.check()


def test_a_request_is_released_once():
    decoding = session()
    [request] = decoding.add(token_tree((1, 5)))
    decoding.release(request)
    with pytest.raises(ValueError, match="released before"):
        decoding.release(request)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "cuda"}, "unknown implementation 'cuda'; known: pallas_mosaic_gpu, "),
        ({"steps_per_call": 0}, "steps_per_call must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        session(**options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 16, "float32"), "num_chunks must be at least 1"),
        ((4, 0, "float32"), "chunk_size must be at least 1"),
        ((4, 16, "int8"), "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_bad_cache_configs_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(*values)


def test_one_sampling_for_each_prompt():
    decoding = session()
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        decoding.add([[1], [2]], [SamplingParams()])
    assert_untouched(decoding)


def test_half_precision_pools_decode():
    """Not the same tokens (that is promised for float32), but the same first ones."""
    prompts = token_tree((1, 64), (2, 9))
    wide = session().generate(prompts, SamplingParams(max_tokens=1))
    for dtype in ("float16", "bfloat16"):
        narrow = DecodeSession(toy_model(), CacheConfig(50, 16, dtype), planner=SHARE_ALL)
        requests = narrow.generate(prompts, SamplingParams(max_tokens=6))
        assert [request.tokens[0] for request in requests] == [r.tokens[0] for r in wide]
        assert np.all([len(request.tokens) == 6 for request in requests])


def test_the_batch_keeps_its_program_until_three_quarters_of_the_rows_have_left():
    prompts = token_tree((1, 32), (8, 3))
    sampling = [SamplingParams(max_tokens=4 + 4 * row) for row in range(8)]
    decoding = session(steps_per_call=4)
    running = decoding.add(prompts, sampling)
    shapes = []
    while any(request.finish_reason is None for request in running):
        decoding.step()
        shapes.append(decoding._plan_shape.rows)
    assert shapes == [8, 8, 8, 8, 8, 8, 2, 2]
    assert tokens_of(running) == [
        greedy_without_cache(prompt, params.max_tokens)
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
