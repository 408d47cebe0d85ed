"""However many requests are placed and chunks copied, their calls are padded to one size."""

from __future__ import annotations

import chex

from jax_chunkattn import CacheConfig, SamplingParams
from jax_chunkattn.device import device, invocations
from jax_chunkattn.device.backend import choose_backend
from jax_chunkattn.device.invocations import COPIES_PER_CALL, ROWS_PER_PLACEMENT, Placement
from jax_chunkattn.device.programs import Programs
from jax_chunkattn.device.request_table import copy_chunks, place_counts, place_rows
from tests.jax_chunkattn.toy import toy_model

SLOTS, CHUNKS = 2 * ROWS_PER_PLACEMENT, 3 * COPIES_PER_CALL


def small_device():
    cache = CacheConfig(CHUNKS, 16)
    backend = choose_backend(toy_model().cache_spec, cache)
    made = invocations.Invocations(toy_model(), cache, backend, num_slots=SLOTS, stop_tokens=[1, 2])
    return device.Device(made)


def test_placing_counting_and_copying_need_a_program_each(monkeypatch):
    monkeypatch.setattr(device, "PROGRAMS", Programs())
    for function in (place_rows, place_counts, copy_chunks):
        traced_once = chex.assert_max_traces(function, n=1)
        monkeypatch.setattr(invocations, function.__name__, traced_once)
    on_device = small_device()
    params = [
        SamplingParams(5),
        SamplingParams(5, repetition_penalty=1.5),
        SamplingParams(9, temperature=0.5, seed=3, logit_bias={4: 1.0}, stop_token_ids=[7]),
        SamplingParams(9, presence_penalty=0.5, logprobs=3),
    ]
    for number in range(1, SLOTS + 1):
        on_device.place(
            [
                Placement(slot, [1, 2, 3] * number, [4] * (slot % 3), params[slot % 4])
                for slot in range(number)
            ]
        )
    for number in range(CHUNKS):
        on_device.copy_chunks([(each, CHUNKS - 1 - each) for each in range(number)])
    assert on_device.counters.compilations == 3
