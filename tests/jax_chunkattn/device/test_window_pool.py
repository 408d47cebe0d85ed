"""The pool in which heads with windows have fewer chunks than the others."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, SamplingParams
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, copy_chunks
from jax_chunkattn.device.window_pool import HeadPlaces, WindowPool
from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.prefill import Segment, pack_segments
from jax_chunkattn.tree.window_room import WindowRoom
from pallas_kernels.windows import Window, WindowMap
from tests.interpreted import implementations
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, windowed_model

SLIDING, FULL = Window(512), None
GEMMA3_1B = CacheSpec(
    26, 1, 256, 4, windows=WindowMap.of_layers([*[SLIDING] * 5, FULL] * 4 + [SLIDING] * 2, 1)
)
MISTRAL = CacheSpec(32, 8, 128, 32, windows=WindowMap.of_layers([Window(4096)] * 32, 8))
ENGINE = {"num_slots": 16, "ahead": 64, "call": 512}


def pool_of(spec: CacheSpec, cache: CacheConfig, rows: int):
    """The shapes of an engine's pool, and its sizes."""
    cache, room = cache.with_window_room(spec, rows, **ENGINE)
    assert room is not None
    pool = jax.eval_shape(functools.partial(WindowPool.allocate, spec, cache, room))
    return pool, cache.chunks_for(spec), room.chunks


@pytest.mark.parametrize(("spec", "least"), [(GEMMA3_1B, 2.3), (MISTRAL, 1.8)])
def test_memory_holds_longer_prompts_than_if_nothing_was_given_up(spec, least):
    memory = 2**34
    cache = CacheConfig(memory=memory, dtype="bfloat16")
    pool, num_chunks, windowed = pool_of(spec, cache, rows=16)
    held = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(pool))
    assert memory - 2 * cache.bytes_per_chunk(spec) < held <= memory
    assert num_chunks > least * cache.chunks_for(spec)
    assert windowed < num_chunks


def test_small_pools_give_up_nothing():
    cache = CacheConfig(num_chunks=200)
    assert cache.with_window_room(GEMMA3_1B, 16, **ENGINE) == (cache, None)
    assert cache.with_window_room(GEMMA3_1B, 4, **ENGINE)[1] is not None


def test_no_two_chunks_lie_in_one_place():
    spec = windowed_model().cache_spec
    places = HeadPlaces.of(spec, 7, 3)
    taken = [set() for _ in range(spec.num_kv_heads)]
    for layer, windows in enumerate(spec.windows_of_heads):
        ids = np.tile(np.arange(8, dtype=np.int32), (spec.num_kv_heads, 1))
        found = np.asarray(places.find(jnp.int32(layer), ids))
        for head, window in enumerate(windows):
            size = 7 if window is None else 3
            assert (found[head, size:] == places.total).all()
            here = set(found[head, :size].tolist())
            assert len(here) == size
            assert not here & taken[head]
            taken[head] |= here
    assert max(map(len, taken)) == places.total
    assert not places.by_layer
    assert HeadPlaces.of(GEMMA3_1B, 7, 3).by_layer


@pytest.mark.slow
@pytest.mark.optimised
def test_decoding_prefill_and_copies_update_it_in_place():
    spec, slots = windowed_model().cache_spec, 4
    sizes: Any = {"chunk_size": 16, "num_chunks": 16_000}
    pool = WindowPool.allocate(
        spec, CacheConfig(16_000, 16), WindowRoom(8_000, Window(21, 20), 16, 32)
    )
    rows = RequestTable.empty(slots, windowed_model().vocab_size)
    state = DeviceState(pool, rows)
    ids, windows = np.arange(16_001, dtype=np.int32), spec.different_windows
    plan, _ = plan_decode(
        [[1, 2, 3], [4, 5, 6]], [16, 16], **sizes, windows=windows, window_ids=ids
    )
    batch = pack_segments(
        [Segment([1] * 100, list(range(30)), 320, 420, 320)],
        num_tokens=128,
        **sizes,
        windows=windows,
        window_ids=ids,
    )
    model, nothing = SplitModel.of(windowed_model()), np.zeros(8, np.int32)
    static = {"num_steps": 8, "implementation": "xla"}
    held = sum(array.nbytes for array in jax.tree.leaves(pool))
    for invocation in (
        Invocation(decode_steps, model, (state, np.arange(2, dtype=np.int32), plan), static),
        Invocation(prefill_step, model, (state, np.full(8, slots, np.int32), batch)),
        Invocation(copy_chunks, None, (state, nothing, nothing, (nothing, nothing))),
    ):
        program, _ = Programs().compiled(invocation)
        assert_pool_is_updated_in_place(
            program, pool_bytes=held, layer_bytes=held // (2 * spec.num_layers)
        )


@implementations
@pytest.mark.slow
def test_each_implementation_decodes_from_it(implementation):
    prompts = token_tree((1, 70), (3, 9))
    engine = make_engine(
        model=windowed_model(),
        window_chunks=50,
        prefill_tokens=128,
        planner=None,
        implementation=implementation,
    )
    assert engine.stats.window_chunks == 50
    tokens = run([engine.submit(prompt, SamplingParams(12)) for prompt in prompts])
    assert engine.backend.decode == engine.backend.prefill == implementation
    assert tokens == [greedy_without_cache(p, 12, model=windowed_model()) for p in prompts]
