"""What this project makes of a checkpoint, with prefix sharing on.

By the parts that the engine is made of, in two programs where an engine needs more: most of what a
case costs is compiling them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_chunkattn import CacheConfig, PlannerOptions, plan_decode
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.pool import ChunkPool, allocate_pool
from jax_chunkattn.device.prefill import prefill_attend
from jax_chunkattn.device.request_table import DeviceState, RequestTable, RowState
from jax_chunkattn.planning.prefill import Segment, pack_segments
from models import LoadedModel
from tests.models.parity.cases import CHUNK_SIZE, GREEDY_TOKENS, PROMPTS, SHARED

NUM_CHUNKS = 64
PACKED_TOKENS = 64
SHARED_CHUNKS = len(SHARED) // CHUNK_SIZE
SIZES: Any = {"chunk_size": CHUNK_SIZE, "num_chunks": NUM_CHUNKS}
SHARE_ALL = PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)


def block_tables() -> list[list[int]]:
    """The chunks of both prompts and of what follows them; they begin with the same."""
    shared = list(range(SHARED_CHUNKS))
    own = -(-(max(map(len, PROMPTS)) + GREEDY_TOKENS) // CHUNK_SIZE) - SHARED_CHUNKS
    return [[*shared, *range(begin, begin + own)] for begin in (SHARED_CHUNKS, SHARED_CHUNKS + own)]


@dataclass(frozen=True)
class Prefilled:
    """Logits `[T, V]` at the positions of both prompts, the shared ones in the first's only."""

    logits: list[np.ndarray]
    pool: ChunkPool


def prefill(loaded: LoadedModel) -> Prefilled:
    """Both prompts in one packed call: the second reads the shared chunks that the first writes."""
    begins = (0, SHARED_CHUNKS * CHUNK_SIZE)
    segments = [
        Segment(prompt[begin:], table, begin, len(prompt), begin)
        for prompt, table, begin in zip(PROMPTS, block_tables(), begins, strict=True)
    ]
    windows = loaded.config.cache_spec.different_windows
    batch = pack_segments(
        segments, num_tokens=PACKED_TOKENS, options=SHARE_ALL, windows=windows, **SIZES
    )
    pool = allocate_pool(loaded.config.cache_spec, CacheConfig(NUM_CHUNKS, CHUNK_SIZE, "float32"))
    logits, pool = _prefill(*nnx.split(loaded.model), pool, batch)
    ends = np.cumsum([segment.end - segment.begin for segment in segments])
    return Prefilled(np.split(np.asarray(logits), ends)[:-1], pool)


@partial(jax.jit, static_argnums=0)
def _prefill(graphdef, state, pool, batch):
    model = nnx.merge(graphdef, state)
    attend = prefill_attend(model.cache_spec, pool, batch.plan, None)
    hidden, pool = model(jnp.asarray(batch.tokens), jnp.asarray(batch.positions), pool, attend)
    return model.logits(hidden), pool


def greedy_tokens(loaded: LoadedModel, prefilled: Prefilled) -> list[list[int]]:
    """The continuation of both prompts, decoded together by a plan that shares."""
    lengths = [len(prompt) for prompt in PROMPTS]
    windows = loaded.config.cache_spec.different_windows
    plan, summary = plan_decode(
        block_tables(), lengths, options=SHARE_ALL, windows=windows, **SIZES
    )
    by_window = zip(windows or [None], summary.by_window or [summary], strict=True)
    assert all(one.shared for window, one in by_window if window is None), summary
    first = [int(logits[-1].argmax()) for logits in prefilled.logits]
    remaining = [GREEDY_TOKENS - 1] * len(PROMPTS)
    rows = RowState(*(np.array(values, np.int32) for values in (first, lengths, remaining)))
    table = RequestTable.of(rows, [], loaded.config.vocab_size)
    tokens = _decode(*nnx.split(loaded.model), DeviceState(prefilled.pool, table), plan)
    return np.concatenate([[first], tokens]).T.tolist()


@partial(jax.jit, static_argnums=0)
def _decode(graphdef, state, device_state, plan):
    slots = np.arange(len(PROMPTS), dtype=np.int32)
    model = nnx.merge(graphdef, state)
    _, chosen = decode_steps(model, device_state, slots, plan, num_steps=GREEDY_TOKENS - 1)
    return chosen.tokens
