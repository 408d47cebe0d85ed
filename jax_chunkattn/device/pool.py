"""The chunk pool: the device arrays that hold every chunk of every layer, whatever its kind."""

from __future__ import annotations

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.clustered_pool import ClusteredPool
from jax_chunkattn.device.coded_pool import CodedPool
from jax_chunkattn.device.exact_pool import ChunkPool, allocate_pool
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.device.selective_pool import SelectivePool
from jax_chunkattn.device.window_pool import WindowPool
from jax_chunkattn.tree.window_room import WindowRoom

__all__ = [
    "ChunkPool",
    "ClusteredPool",
    "CodedPool",
    "Pool",
    "SelectivePool",
    "WindowPool",
    "allocate_pool",
    "empty_pool",
]

Pool = ChunkPool | ClusteredPool | CodedPool | SelectivePool | WindowPool
"""All keys and values that an engine keeps, and how it keeps them."""


def empty_pool(
    spec: CacheSpec,
    config: CacheConfig,
    num_slots: int,
    columns: int,
    window_room: WindowRoom | None = None,
) -> Pool:
    """A pool of zeros on the default device, for rows in so many slots at once, of at most
    `columns` chunks each; with `window_room`, heads with windows have chunks of their own."""
    if window_room is not None:
        return WindowPool.allocate(spec, config, window_room)
    if config.clusters is not None:
        return ClusteredPool.allocate(spec, config, num_slots)
    if config.chunk_codec is None:
        kv = allocate_pool(spec, config)
    else:
        kv = CodedPool.allocate(spec, config, num_slots)
    if config.selector is None:
        return kv
    return SelectivePool.around(kv, spec, config, num_slots, columns)
