"""What this project makes of a checkpoint, with prefix sharing on."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_chunkattn import CacheConfig, Engine, PlannerOptions, SamplingParams
from jax_chunkattn.pool import allocate_pool
from jax_chunkattn.prefill import Segment, pack_segments, prefill_attend
from models import LoadedModel
from tests.models.parity.cases import CHUNK_SIZE, GREEDY_TOKENS, PROMPTS, SHARED

NUM_CHUNKS = 64
PACKED_TOKENS = 64
SHARE_ALL = PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)


def prompt_logits(loaded: LoadedModel) -> list[np.ndarray]:
    """Logits `[T, V]` at every position of both prompts.

    Computed in one packed call, through the pool: the second prompt reads what the first writes of
    the chunks that they share.
    """
    shared = len(SHARED) // CHUNK_SIZE
    tables = [[0, 1, 2], [*range(shared), *range(3, 6 - shared)]]
    tables = [
        table[: -(-len(prompt) // CHUNK_SIZE)]
        for table, prompt in zip(tables, PROMPTS, strict=True)
    ]
    begins = (0, shared * CHUNK_SIZE)
    segments = [
        Segment(prompt[begin:], table, begin, len(prompt), begin)
        for prompt, table, begin in zip(PROMPTS, tables, begins, strict=True)
    ]
    batch = pack_segments(
        segments,
        num_tokens=PACKED_TOKENS,
        chunk_size=CHUNK_SIZE,
        num_chunks=NUM_CHUNKS,
        options=SHARE_ALL,
    )
    pool = allocate_pool(loaded.config.cache_spec, CacheConfig(NUM_CHUNKS, CHUNK_SIZE, "float32"))
    logits = np.asarray(_packed_logits(*nnx.split(loaded.model), pool, batch))
    first, second = PROMPTS
    of_first = logits[: len(first)]
    of_second = logits[len(first) : len(first) + len(second) - begins[1]]
    return [of_first, of_second]


@partial(jax.jit, static_argnums=0)
def _packed_logits(graphdef, state, pool, batch):
    model = nnx.merge(graphdef, state)
    attend = prefill_attend(model.cache_spec, batch.plan, None)
    hidden, _ = model(jnp.asarray(batch.tokens), jnp.asarray(batch.positions), pool, attend)
    return model.logits(hidden)


def greedy_tokens(loaded: LoadedModel) -> list[list[int]]:
    """The continuation of both prompts, decoded together by an engine that shares."""
    engine = Engine(
        loaded.model,
        CacheConfig(NUM_CHUNKS, CHUNK_SIZE, "float32"),
        max_running=2,
        steps_per_call=8,
        prefill_first=True,
        planner=SHARE_ALL,
    )
    handles = [
        engine.submit(prompt, SamplingParams(max_tokens=GREEDY_TOKENS)) for prompt in PROMPTS
    ]
    tokens = [list(handle.result().tokens) for handle in handles]
    assert engine.stats.shared_tokens >= CHUNK_SIZE, engine.stats.plan_decision
    return tokens
