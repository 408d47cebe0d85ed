"""The pool of clustered heads: its bytes, what it refuses, and what programs and engines do with
it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, CacheSpec, SamplingParams
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.pool import ClusteredPool
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Invocation, Programs, SplitModel
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState, copy_chunks
from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.prefill import Segment, pack_segments
from pallas_kernels.chunk_attention import pallas_triton
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.codecs import AffineCodec, ChunkCodec, HeadConstants, codec_of
from pallas_kernels.implementations import AttentionShapes, ImplementationError
from pallas_kernels.selection import ChunkSelector
from tests.interpreted import implementations_of_clusters
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.rule.clusters import logits_by_the_definition
from tests.jax_chunkattn.toy import layered_model, token_tree, toy_model, windowed_model

COUNTS = (2, 1)
CLUSTERS = HeadClusters(COUNTS)
SLOTS = 8
CALIBRATED = ChunkCodec(
    "nuq4",
    AffineCodec(4, "tokens"),
    AffineCodec(4, "channels"),
    HeadConstants.of({"outliers": np.zeros((2, 2, 4), np.float32)}, {}),
)
GPT2 = CacheSpec(12, 12, 64, 12)


@pytest.mark.parametrize(
    ("counts", "of_all", "codec"),
    [
        ((12,) * 11 + (11,), 1.003, "identity"),
        ((6,) * 12, 4 / 3, "identity"),
        ((1,) * 12, 24 / 13, "identity"),
        ((6,) * 12, 1.346, "int4"),  # codes of keys take less than of values
    ],
)
def test_tokens_in_the_same_memory(counts, of_all, codec):
    """Keys, values, maps and tails together, against a pool of the same memory without clusters."""
    memory, rows = 2**30, 8

    def tokens(cache):
        return cache.chunk_size * cache.chunks_for(GPT2, rows)

    cache = CacheConfig(memory=memory, clusters=HeadClusters(counts), codec=codec)
    pool = jax.eval_shape(functools.partial(ClusteredPool.allocate, GPT2, cache, rows))
    held = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(pool))
    chunks = cache.chunks_for(GPT2, rows)
    assert held == chunks * cache.bytes_per_chunk(GPT2) + rows * cache.tail_bytes(GPT2)
    assert memory - cache.bytes_per_chunk(GPT2) < held <= memory
    tails = rows * cache.tail_bytes(GPT2)
    plain_rows = rows if cache.chunk_codec is not None else 0
    plain_tails = plain_rows * replace(cache, clusters=None).tail_bytes(GPT2)
    plain = tokens(CacheConfig(memory=memory - tails + plain_tails, codec=codec))
    assert tokens(cache) / plain == pytest.approx(of_all, rel=0.01)


def test_clusters_of_one_head_each_are_none():
    """So an engine runs the program that it runs without them."""
    spec, cache = toy_model().cache_spec, CacheConfig(8, 16)
    assert replace(cache, clusters=HeadClusters((4, 4))).for_model(spec) == cache
    assert replace(cache, clusters=CLUSTERS).for_model(spec).clusters == CLUSTERS
    assert make_engine(clusters=HeadClusters((4, 4))).stats.clusters is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": HeadClusters((2,))}, "clusters of 1 layers for a model of 2"),
        ({"clusters": HeadClusters((2, 5))}, "layer 1 is to have 5 clusters of 4 heads"),
        ({"clusters": CLUSTERS, "codec": CALIBRATED}, "was calibrated for each KV head"),
        ({"clusters": CLUSTERS, "selector": ChunkSelector(0.5)}, "takes no selector yet"),
        ({"clusters": CLUSTERS, "window_chunks": 8}, "window_chunks is not for"),
        ({"clusters": CLUSTERS, "model": windowed_model()}, "only where all have the same window"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_engine(**options)


def test_a_kernel_that_cannot_read_them_is_refused():
    with pytest.raises(ImplementationError, match="cannot run"):
        make_engine(clusters=CLUSTERS, implementation="pallas_mosaic_gpu")
    shapes = AttentionShapes("bfloat16", 1, 64, 64, codec_of("int8"), clustered=True)
    why = "the Triton kernels read no codes of clustered heads"
    assert pallas_triton.unsupported(shapes) == why


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.optimised
def test_decoding_and_prefill_update_the_pool_in_place():
    spec, chunks = toy_model().cache_spec, 4_000
    cache = CacheConfig(chunks, 16, clusters=CLUSTERS)
    pool = ClusteredPool.allocate(spec, cache, SLOTS)
    rows = np.zeros((3, SLOTS), np.int32)
    rows[:, :2] = [[1, 1], [16, 16], [20, 20]]
    state = DeviceState(pool, RequestTable.of(RowState(*rows), [], toy_model().vocab_size))
    tables = [[1, 2, 3], [4, 5, 6]]
    sizes: Any = {"chunk_size": 16, "num_chunks": chunks}
    plan, _ = plan_decode(tables, [16, 16], columns=8, **sizes)
    model, slots = SplitModel.of(toy_model()), np.arange(2, dtype=np.int32)
    static = {"num_steps": 8, "implementation": "xla"}
    segment = Segment([1] * 100, list(range(30)), 320, 420, 320)
    batch = pack_segments([segment], num_tokens=128, num_slots=SLOTS, **sizes)
    ids = np.zeros(8, np.int32)
    for invocation in (
        Invocation(decode_steps, model, (state, slots, plan), static),
        Invocation(prefill_step, model, (state, np.full(8, SLOTS, np.int32), batch)),
        Invocation(copy_chunks, None, (state, ids, ids)),
    ):
        program, _ = Programs().compiled(invocation)
        assert_pool_is_updated_in_place(
            program,
            pool_bytes=pool.keys.nbytes + pool.values.nbytes,
            layer_bytes=pool.keys.nbytes // spec.num_layers,
        )


@implementations_of_clusters
@pytest.mark.slow
@pytest.mark.parametrize("model_of", [toy_model, layered_model], ids=["all", "windows"])
def test_each_implementation_decodes_from_it(implementation, model_of):
    """Some share a prefix, and one fills its first chunk with its answer."""
    counts, prompts = (2, 3), [*token_tree((1, 70), (3, 9)), *token_tree((1, 11), seed=1)]
    model = model_of()
    engine = make_engine(
        model=model,
        clusters=HeadClusters(counts),
        prefill_tokens=128,
        planner=None,
        implementation=implementation,
    )
    answers = run([engine.submit(prompt, SamplingParams(12)) for prompt in prompts])
    assert engine.backend.decode == engine.backend.prefill == implementation
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = logits_by_the_definition(model, counts, 16, [*prompt, *answer])
        assert np.argmax(logits[len(prompt) - 1 : -1], axis=1).tolist() == answer


@pytest.mark.slow
def test_short_prompts_and_their_branches_are_the_definitions():
    """First chunks that decoding fills, forks in them and behind them, and prompts of one chunk."""
    engine = make_engine(clusters=CLUSTERS)
    [prompt] = token_tree((1, 16), seed=11)
    for length in (1, 9, 15, 16):
        parent = engine.submit(prompt[:length], SamplingParams(12), hold=True)
        *begin, last = parent.result().tokens
        fork = parent.fork(SamplingParams(32), next_token=(last + 1) % 256)
        for tokens in run([parent, fork]):
            whole = [*prompt[:length], *tokens]
            greedy = logits_by_the_definition(toy_model(), COUNTS, 16, whole).argmax(axis=1)
            expected = greedy[length - 1 : -1].tolist()
            changed = len(begin)  # the fork was given another token there
            assert tokens[:changed] == expected[:changed]
            assert tokens[changed + 1 :] == expected[changed + 1 :]
        parent.release()
    assert engine.stats.forks == 4
    assert_all_returned(engine)
