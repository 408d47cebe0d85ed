"""Engines over several devices give what one device gives, and move nothing that need not move."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from experiments.compile_report.hlo import Module
from experiments.harness.compilations import count_compilations
from jax_chunkattn import CacheConfig, ChunkPool, Engine, SamplingParams
from jax_chunkattn.device.logical_axes import MeshError
from jax_chunkattn.device.mesh import EngineMesh
from jax_chunkattn.planning.planner import PlannerOptions
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.selection import ChunkSelector
from pallas_kernels.targets import A100, use_target
from tests.interpreted import skip_unless_there
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import (
    WIDER,
    greedy_without_cache,
    mesh_of,
    token_tree,
    toy_model,
    toy_model_on,
)

COLLECTIVES = {
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
}  # fmt: skip
NUM_TOKENS = 24
HIDDEN, VOCABULARY = 64, 4096


def engine_on(devices: int | None, *, sizes=None, **options) -> Engine:
    model = toy_model_on(devices, **(sizes or {}))
    mesh = None if devices is None else mesh_of(devices)
    return make_engine(model=model, mesh=mesh, **options)


def answers(engine: Engine) -> list:
    """Of requests of many kinds in a pool too small for them, and of a fork."""
    prompts = token_tree((1, 50), (2, 20), (2, 9), seed=3)
    kinds = [
        SamplingParams(NUM_TOKENS),
        SamplingParams(NUM_TOKENS, temperature=0.8, top_p=0.9, seed=5, n=2),
        SamplingParams(NUM_TOKENS, repetition_penalty=1.2, frequency_penalty=0.1),
        SamplingParams(NUM_TOKENS, logprobs=3),
    ]
    found = [[one.tokens for one in output.samples] for output in engine.generate(prompts, kinds)]
    parent = engine.submit(prompts[0], SamplingParams(NUM_TOKENS), hold=True)
    parent.result()
    child = parent.fork(SamplingParams(NUM_TOKENS + 5), next_token=3)
    found.append([child.result().tokens])
    parent.release()
    engine.check()
    return found


def programs_of(engine: Engine) -> dict[str, str]:
    """The programs it has compiled, as text, by the function; of several the last."""
    texts = [program.as_text() or "" for program in engine._core.device._programs.values()]
    return {text.split(",")[0].removeprefix("HloModule jit_"): text for text in texts}


def collectives(text: str) -> list:
    """The operations that exchange data."""
    operations = [operation for _, operation in Module(text).unfused()]
    return [one for one in operations if one.kind.removesuffix("-start") in COLLECTIVES]


@pytest.mark.slow
@pytest.mark.devices(2)
def test_two_devices_give_what_one_gives():
    """In float32 greedy tokens, and sampled ones by their seeds: with sharing, forks, preemption
    and eviction. Nothing is compiled after a warm-up."""
    engine = engine_on(2, num_chunks=14, max_running=4, prefill_tokens=32)
    engine.warm_up(threads=2)
    with count_compilations() as counted:
        found = answers(engine)
        engine.reset()
        assert answers(engine) == found
    assert (counted.compiled, counted.from_cache) == (0, 0)
    stats = engine.stats
    assert stats.preemptions > 0 < stats.evictions
    assert stats.forks > 0 == stats.recoveries
    assert_all_returned(engine)
    assert found == answers(engine_on(None, num_chunks=14, max_running=4, prefill_tokens=32))
    [prompt, *_] = token_tree((1, 50), (2, 20), (2, 9), seed=3)
    assert list(found[0][0]) == greedy_without_cache(prompt, NUM_TOKENS)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "implementation", [pytest.param("xla", marks=pytest.mark.thorough), "native"]
)
def test_more_devices_give_what_one_gives(implementation):
    """As many as there are KV heads, fewer, and more: then several have the same."""
    if implementation == "native":
        skip_unless_there("native")
    for sizes, all_devices in (({}, (1, 4)), (WIDER, (2, 4, 8)), ({"num_heads": 8}, (8,))):
        how = {"sizes": sizes, "implementation": implementation, "num_chunks": 14}
        expected = answers(engine_on(None, max_running=4, **how))
        for devices in all_devices:
            engine = engine_on(devices, max_running=4, **how)
            assert answers(engine) == expected
            assert engine.stats.preemptions > 0 < engine.stats.evictions
            compilations = engine.stats.compilations
            engine.reset()
            assert answers(engine) == expected
            assert engine.stats.compilations == compilations
            assert_all_returned(engine)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.devices(4)
def test_a_kernel_for_gpus_attends_on_each_device():
    """Triton's, interpreted, with one KV head on a device and with half of its query heads."""
    with use_target(replace(A100, interpret=True)):
        for devices in (2, 4):
            how = {"implementation": "pallas_triton", "planner": None, "max_running": 2}
            prompts = token_tree((1, 40), (2, 5), seed=4)
            engine = engine_on(devices, **how)
            found = run([engine.submit(prompt, SamplingParams(4)) for prompt in prompts])
            assert found == [greedy_without_cache(prompt, 4) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.devices(4)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(WIDER, id="own heads"),
        pytest.param({}, id="copies", marks=pytest.mark.thorough),
    ],
)
def test_a_layer_exchanges_two_sums_and_the_pool_stays_where_it_is(sizes):
    """Read off the compiled programs: what a layer more adds, how large what is exchanged is, and
    whether the pool is copied."""
    chunks, found = 3000, {}
    for layers in (2, 3):
        model = toy_model_on(4, unroll=True, vocab_size=VOCABULARY, num_layers=layers, **sizes)
        engine = make_engine(chunks, model=model, mesh=mesh_of(4), implementation="xla")
        [prompt] = token_tree((1, 40))
        held = engine.submit(prompt, SamplingParams(5, repetition_penalty=1.1), hold=True)
        held.result()
        held.fork(SamplingParams(6)).result()
        found[layers] = programs_of(engine)
        state = engine._core.device._state
        assert state is not None
        assert isinstance(state.pool, ChunkPool)
        pool = state.pool
        [shard] = {one.data.nbytes for one in pool.keys.addressable_shards}
        spec = model.cache_spec
        devices = min(4, spec.num_kv_heads)
        assert shard == pool.keys.nbytes // devices
        for program in engine._core.device._programs.values():
            assert_pool_is_updated_in_place(
                program, pool_bytes=2 * shard, layer_bytes=shard // layers
            )
    for name, rows in (("decode_steps", 1), ("prefill_step", 8)):
        few, many = (collectives(found[layers][name]) for layers in (2, 3))
        kinds = [Counter(one.kind.removesuffix("-start") for one in some) for some in (few, many)]
        assert kinds[1] - kinds[0] == {"all-reduce": 2}
        assert kinds[0] - kinds[1] == {}
        # Beside the sums of layers and of the embedding there is what each device likes best, or
        # adds up; and where likeliest tokens are reported, in a branch, all logits.
        hidden = [one for one in many if str(one.results[0]).endswith(f",{HIDDEN}]")]
        assert {one.kind.removesuffix("-start") for one in hidden} == {"all-reduce"}
        assert len(hidden) == 2 * 3 + 1
        sizes_of_others = sorted(
            array.nbytes for one in many if one not in hidden for array in one.results
        )
        assert sizes_of_others[-1] == 4 * rows * VOCABULARY
        assert sizes_of_others[-2] <= 4 * rows * 4
    for name in ("place_rows", "place_counts", "copy_chunks"):
        assert collectives(found[3][name]) == []


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.devices(2)
@pytest.mark.parametrize("codec", ["int8", pytest.param("fp8", marks=pytest.mark.thorough)])
def test_encoded_chunks_are_those_of_one_device(codec):
    prompts = token_tree((1, 50), (2, 20), seed=3)
    found = {}
    for devices in (None, 2):
        engine = engine_on(devices, codec=codec, implementation="xla")
        handles = [engine.submit(prompt, SamplingParams(NUM_TOKENS)) for prompt in prompts]
        found[devices] = run(handles)
        assert engine.stats.codec == codec
    assert found[2] == found[None]


@pytest.mark.slow
@pytest.mark.devices(8)
def test_what_cannot_be_laid_over_a_mesh_is_refused_by_name(caplog):
    cache, devices = CacheConfig(20, 16), jax.devices()

    def refused(reason, mesh, model=None, **options):
        with pytest.raises(MeshError, match=reason) as caught:
            Engine(model or toy_model(), options.pop("cache", cache), mesh=mesh, **options)
        assert "\n" not in str(caught.value)

    explicit = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,))
    refused("axes that are Explicit", explicit)
    refused("needs an axis 'tp'", Mesh(np.array(devices[:2]), ("dp",)))
    both = Mesh(np.array(devices[:4]).reshape(2, 2), ("dp", "tp"))
    refused("2 devices along 'dp'", both)
    refused("4 query heads and 2 KV heads cannot be split over the 8 devices", mesh_of(8))
    refused("4 query heads and 2 KV heads cannot be split over the 3 devices", mesh_of(3))
    refused("weights do not lie on the engine's mesh of 2 devices", mesh_of(2))
    refused("weights do not lie", Mesh(np.array(devices[2:4]), ("tp",)), toy_model_on(2))
    refused("weights are on 2 devices: give the engine their mesh", None, toy_model_on(2))

    on_two = {"mesh": mesh_of(2), "model": toy_model_on(2)}
    refused(
        "'scores 0.5' cannot be split", cache=replace(cache, selector=ChunkSelector(0.5)), **on_two
    )
    clusters = replace(cache, clusters=HeadClusters((2, 3)))
    refused("clusters cannot be split", cache=clusters, **on_two)
    behind = replace(cache, host_memory="1MB")
    refused("host_memory and disk are not for engines on a mesh", cache=behind, **on_two)
    refused("deterministic engines are of one device", deterministic=True, **on_two)

    with pytest.raises(MeshError, match="cannot be split over the 3 devices"):
        toy_model_on(3)
    with pytest.raises(MeshError, match=r"mlp \(129\) cannot be split over the 2 devices"):
        toy_model_on(2, intermediate_size=129)
    with caplog.at_level(logging.INFO):
        laid = EngineMesh.of(mesh_of(4), toy_model().cache_spec)
    assert "4 devices and 2 KV heads: each KV head is on 2 devices" in caplog.text
    assert (laid.head_devices, laid.copies, laid.num_devices) == (2, 2, 4)
    assert laid.mesh.devices.ravel().tolist() == devices[:4]


@pytest.mark.slow
def test_a_mesh_of_one_device_is_like_none():
    """Selectors and determinism too: nothing is split."""
    prompts = token_tree((1, 50), (2, 20), seed=3)
    engine = engine_on(1)
    found = run([engine.submit(prompt, SamplingParams(NUM_TOKENS)) for prompt in prompts])
    assert found == [greedy_without_cache(prompt, NUM_TOKENS) for prompt in prompts]
    assert engine.backend == make_engine().backend
    Engine(
        toy_model_on(1),
        CacheConfig(20, 16, selector=ChunkSelector(0.5)),
        planner=PlannerOptions(),
        mesh=mesh_of(1),
    )
