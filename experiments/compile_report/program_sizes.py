"""How large a whole program is, and its abstract arguments: shapes, with nothing allocated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from experiments.compile_report.cases import abstract, abstract_plan
from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.pool import ChunkPool, allocate_pool
from jax_chunkattn.device.request_table import DeviceState, RequestTable
from models.config import DecoderConfig
from models.presets import PRESETS


@dataclass(frozen=True)
class ProgramSize:
    """How large a program's model, batch and pool are."""

    config: DecoderConfig = PRESETS["llama-3-8b"]
    rows: int = 64
    num_chunks: int = 4096
    chunk_size: int = 64
    dtype: str = "bfloat16"
    steps: int = 8
    prefill_tokens: int = 512


def decode_arguments(size: ProgramSize, pool: ChunkPool) -> tuple:
    """State, slots and plan of `size.rows` rows."""
    return abstract_state(size, pool), abstract((size.rows,)), abstract_plan(size.rows)


def abstract_state(size: ProgramSize, pool: ChunkPool) -> DeviceState:
    """A pool, and a table with a slot for each row."""
    empty = partial(RequestTable.empty, size.rows, size.config.vocab_size)
    return DeviceState(pool, jax.eval_shape(empty))


def abstract_pool(size: ProgramSize) -> ChunkPool:
    cache = CacheConfig(size.num_chunks, size.chunk_size, size.dtype)
    return jax.eval_shape(partial(allocate_pool, size.config.cache_spec, cache))


def pool_sizes(pool: ChunkPool) -> tuple[int, int]:
    """Bytes of the pool, and of one layer's keys."""
    keys = pool.keys.size * pool.keys.dtype.itemsize
    return 2 * keys, keys // pool.keys.shape[0]
