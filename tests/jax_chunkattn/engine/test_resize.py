"""A pool of another size, while requests run: nothing is lost."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from jax_chunkattn import Engine, EngineClosed, PoolExhausted, SamplingParams
from jax_chunkattn.device.device import Device
from jax_chunkattn.engine.virtual_tokens import InvalidPrefix
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, windowed_model

PROMPTS = token_tree((1, 40), (3, 9), seed=4)
NUM_TOKENS = 30
SMALL, LARGE = 10, 24


@functools.cache
def right() -> list[list[int]]:
    """What a model without a cache answers."""
    return [greedy_without_cache(prompt, NUM_TOKENS) for prompt in PROMPTS]


def engine_of(num_chunks: int, **options: Any) -> Engine:
    return make_engine(num_chunks, **{"prefill_tokens": 32, "max_running": 3, **options})


def submit_all(engine: Engine) -> list:
    return [engine.submit(prompt, SamplingParams(NUM_TOKENS)) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("begin", "end"), [(SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL)], ids=str
)
def test_requests_go_on_in_a_pool_of_another_size(begin: int, end: int):
    for steps in (0, 1, 4):
        engine = engine_of(begin)
        handles = submit_all(engine)
        for _ in range(steps):
            engine.step()
        engine.resize(num_chunks=end)
        stats = engine.stats
        assert stats.chunks_free + stats.chunks_cached + stats.chunks_in_use == end
        assert run(handles) == right()
        assert engine.stats.recoveries == 0
        assert_all_returned(engine)


def test_what_was_computed_comes_back_from_the_tier():
    engine = engine_of(SMALL, host_memory="1MB", load="always")
    assert run(submit_all(engine)) == right()
    prefix = engine.pin(PROMPTS[0])
    handle = engine.submit(PROMPTS[1], SamplingParams(NUM_TOKENS))
    while len(handle.tokens) < 10:
        engine.step()
    computed = engine.stats.prefill_tokens
    engine.resize(num_chunks=LARGE)
    assert list(handle.result().tokens) == right()[1]
    assert run(submit_all(engine)) == right()
    # The last token of a prompt, what is behind its last whole chunk, and what the one that ran had
    # in its tail: no chunk twice.
    assert engine.stats.prefill_tokens - computed < 4 * 16
    tiers = engine.stats.tiers
    assert tiers is not None
    assert tiers.loaded_from_host
    assert prefix.computed
    prefix.release()
    assert_all_returned(engine)


def test_a_size_that_is_too_small_for_somebody_is_refused_and_all_go_on():
    engine = engine_of(LARGE)
    handles = submit_all(engine)
    engine.step()
    before = engine.stats.chunks_in_use
    with pytest.raises(PoolExhausted, match="the pool has 3"):
        engine.resize(num_chunks=3)
    with pytest.raises(ValueError, match="num_chunks or memory, and not both"):
        engine.resize()
    with pytest.raises(ValueError, match="num_chunks or memory, and not both"):
        engine.resize(num_chunks=4, memory="1MB")
    with pytest.raises(ValueError, match="num_chunks must be at least 1"):
        engine.resize(num_chunks=0)
    with pytest.raises(ValueError, match="a size is"):
        engine.resize(memory="much")
    assert engine.stats.chunks_in_use == before
    assert engine.cache.num_chunks == LARGE
    assert run(handles) == right()
    assert_all_returned(engine)


def test_a_size_may_be_given_as_memory():
    engine = engine_of(LARGE)
    engine.resize(memory=12 * engine.stats.bytes_per_chunk)
    assert engine.stats.chunks_free == 12
    assert engine.cache.memory is not None
    assert engine.cache.num_chunks is None
    assert run(submit_all(engine)) == right()


def test_heads_with_windows_have_other_room_too():
    engine = engine_of(200, model=windowed_model())
    handles = submit_all(engine)
    engine.step()
    engine.resize(num_chunks=150)
    expected = [greedy_without_cache(one, NUM_TOKENS, model=windowed_model()) for one in PROMPTS]
    assert run(handles) == expected
    assert engine.stats.chunks_free + engine.stats.chunks_cached == 150
    engine.check()


def test_heads_with_windows_that_come_to_have_fewer_chunks_are_told_and_take_no_prefix():
    model = windowed_model()
    spec = model.cache_spec
    engine, other = engine_of(SMALL, model=model), engine_of(200, model=model)
    engine.resize(num_chunks=200)
    for name in ("window_chunks", "bytes_per_chunk", "bytes_per_window_chunk"):
        assert getattr(engine.stats, name) == getattr(other.stats, name) > 0
    learned = np.ones((2, spec.num_layers, spec.num_kv_heads, 16, spec.head_dim), np.float32)
    with pytest.raises(InvalidPrefix, match="chunks of their own"):
        engine.add_prefix("learned", *learned)
    engine.resize(num_chunks=SMALL)
    engine.add_prefix("learned", *learned)
    assert engine.stats.window_chunks == 0
    engine.run()
    engine.check()


def test_learned_prefixes_keep_heads_with_windows_from_having_fewer_chunks():
    model = windowed_model()
    spec = model.cache_spec
    engine = engine_of(SMALL, model=model)
    learned = np.ones((2, spec.num_layers, spec.num_kv_heads, 16, spec.head_dim), np.float32)
    prefix = engine.add_prefix("learned", *learned)
    with pytest.raises(ValueError, match="one for all heads"):
        engine.resize(num_chunks=200)
    assert engine.cache.num_chunks == SMALL
    prefix.release()
    engine.resize(num_chunks=200)
    engine.check()


def test_a_pool_that_cannot_be_had_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(SMALL)
    handles = submit_all(engine)
    engine.step()
    reset, calls = Device.reset, []

    def fail_once(device: Device) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        reset(device)

    monkeypatch.setattr(Device, "reset", fail_once)
    with pytest.raises(MemoryError):
        engine.resize(num_chunks=LARGE)
    assert engine.cache.num_chunks == SMALL
    assert run(handles) == right()
    assert_all_returned(engine)


def test_ctrl_c_in_the_midst_of_it_is_mended(monkeypatch: pytest.MonkeyPatch):
    for at in range(2):
        engine = engine_of(SMALL)
        handles = submit_all(engine)
        engine.step()
        reset, calls = Device.reset, []

        def interrupted(device: Device, at=at, reset=reset, calls=calls) -> None:
            calls.append(1)
            if at:
                reset(device)
            if len(calls) == 1:
                raise KeyboardInterrupt
            if not at:
                reset(device)

        with monkeypatch.context() as patch:
            patch.setattr(Device, "reset", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.resize(num_chunks=LARGE)
        assert run(handles) == right()
        stats = engine.stats
        assert stats.chunks_free + stats.chunks_cached == LARGE, "it was carried out"
        engine.check()


def test_a_closed_engine_is_not_resized():
    engine = engine_of(SMALL)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.resize(num_chunks=LARGE)


def test_warm_up_compiles_for_the_new_size():
    engine = engine_of(SMALL)
    engine.resize(num_chunks=LARGE)
    engine.warm_up()
    compiled = engine.stats.compilations
    assert run(submit_all(engine)) == right()
    assert engine.stats.compilations == compiled
