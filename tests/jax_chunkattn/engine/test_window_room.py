"""Engines whose pool gives up what windows have left."""

from __future__ import annotations

import jax
import pytest

from jax_chunkattn import CacheConfig, Engine, PoolExhausted, SamplingParams
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, toy_model, windowed_model

[LONG, *OTHERS] = token_tree((1, 150), (4, 30), seed=8)
[STRANGER] = token_tree((1, 170), seed=9)
ROOM = 26
"""Chunks for a call, and for the windows of 4 sequences at once: 6 each."""
PARAMS = SamplingParams(12)


def engine_of(**options) -> Engine:
    options = {"prefill_tokens": 32, "window_chunks": ROOM, **options}
    return make_engine(model=windowed_model(), **options)


def answers_of(engine: Engine, prompts) -> list[list[int]]:
    return run([engine.submit(prompt, PARAMS) for prompt in prompts])


def expected(prompt) -> list[int]:
    return greedy_without_cache(prompt, PARAMS.max_tokens, model=windowed_model())


@pytest.mark.slow
def test_long_prompts_need_no_more_than_their_windows():
    engine = engine_of()
    prompts = [LONG, *OTHERS, STRANGER]
    answers = answers_of(engine, prompts)
    assert answers[0] == expected(LONG)
    assert answers[-1] == expected(STRANGER)
    compiled = engine.stats.compilations
    assert answers_of(engine, prompts[::-1]) == answers[::-1]
    stats = engine.stats
    assert stats.compilations == compiled
    assert stats.window_chunks == ROOM
    assert 0 < stats.most_window_chunks_in_use <= ROOM < stats.most_chunks_in_use
    assert stats.kv_bytes_held < stats.most_chunks_in_use * CacheConfig(1, 16).bytes_per_chunk(
        windowed_model().cache_spec
    )
    assert_all_returned(engine)
    assert engine.stats.window_chunks_in_use == 0


def test_what_windows_lack_of_a_prefix_is_computed_again_and_told():
    engine = engine_of()
    answers_of(engine, [LONG])
    for tokens in (STRANGER, STRANGER[::-1]):  # they take what the first has passed by
        answers_of(engine, [tokens])
    begin = LONG[:100]
    before = engine.stats
    assert answers_of(engine, [begin]) == [expected(begin)]
    after = engine.stats
    window = after.prompts.window - before.prompts.window
    assert window > 0
    assert after.prompts.hit - before.prompts.hit == 96 - window
    assert after.prefill_tokens - before.prefill_tokens == len(begin) - 96 + window
    assert answers_of(engine, [begin]) == [expected(begin)]
    assert engine.stats.prompts.hit - after.prompts.hit == 96
    engine.check()


def test_forks_and_pinned_prefixes_count_as_sequences():
    engine = engine_of()
    pinned = [engine.pin(prompt[:64]) for prompt in (LONG, STRANGER, OTHERS[0])]
    with pytest.raises(PoolExhausted, match="beside the 3 prefixes pinned and a request"):
        engine.pin(LONG[:32])
    parent = engine.submit(LONG, SamplingParams(12), hold=True)
    parent.result()
    children = [parent.fork(SamplingParams(20)) for _ in range(3)]  # for which there is no room
    answer = greedy_without_cache(LONG, 20, model=windowed_model())
    assert run(children) == [answer] * 3
    parent.release()
    for prefix in pinned:
        prefix.release()
    assert_all_returned(engine)


@pytest.mark.slow
def test_samples_of_a_prompt_go_on_from_copies():
    engine = engine_of()
    params = SamplingParams(12, n=3, temperature=0.7, seed=5)
    samples = run(engine.submit_samples(LONG, params))
    assert engine.stats.forks == 2
    plain = make_engine(model=windowed_model(), window_chunks=200)
    assert plain.stats.window_chunks == 0
    assert run(plain.submit_samples(LONG, params)) == samples
    assert_all_returned(engine)


def test_a_pool_holds_what_its_sizes_say():
    spec = windowed_model().cache_spec
    engine = engine_of()
    state = engine._core.device._state
    assert state is not None
    held = sum(array.nbytes for array in jax.tree.leaves(state.pool))
    stats = engine.stats
    expected = 200 * stats.bytes_per_chunk + ROOM * stats.bytes_per_window_chunk
    # Heads of one number in all layers lie in one array: here 1 of 2 has a window.
    assert stats.bytes_per_chunk + stats.bytes_per_window_chunk == (
        CacheConfig(1, 16).bytes_per_chunk(spec)
    )
    assert expected <= held


@pytest.mark.parametrize(
    ("model", "cache", "error"),
    [
        (toy_model, {"window_chunks": 30}, "window_chunks is for models with windows"),
        (windowed_model, {"window_chunks": 30, "codec": "int8"}, "not for pools with a codec"),
        (windowed_model, {"window_chunks": 5}, "a sequence may need 38 chunks of 16 tokens"),
        (windowed_model, {"window_chunks": 0}, "window_chunks must be at least 1"),
    ],
)
def test_room_that_cannot_be_is_refused(model, cache, error):
    with pytest.raises(ValueError, match=error):
        make_engine(model=model(), **cache)
