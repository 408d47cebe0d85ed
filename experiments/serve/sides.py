"""One side of the comparison: its policy, the pool, and an engine of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.cluster_option import chosen_clusters
from experiments.codecs import codec_for
from experiments.harness.errors import UserError
from experiments.mesh_option import chosen_mesh
from experiments.pool_option import pool_within
from experiments.select_option import chosen_selector
from experiments.serve.config import ServeConfig, Side
from experiments.serve.replay import Replayed, Served, replay
from experiments.serve.workload import Workload
from jax_chunkattn import CacheConfig, Engine
from jax_chunkattn.engine.admission import chunks_to_finish
from jax_chunkattn.planning.planner import bucket
from models import LoadedModel

DEFAULT_MEMORY = "1GiB"
POLICIES: dict[Side, dict[str, bool]] = {
    "shared": {},
    "free-at-once": {"retain": False},
    # No later request can find its chunks, so none are kept.
    "unshared": {"sharing": False, "retain": False},
}


def pool_for(config: ServeConfig, loaded: LoadedModel, workload: Workload) -> CacheConfig:
    """The pool of every side.

    Without a size from the user it holds all that the requests compute without sharing, rounded up
    to a power of two (few sizes, few programs to compile), within `DEFAULT_MEMORY`.

    Raises:
        UserError: a size that is none, or too small for the largest request.
    """
    chunk_size, spec = config.tokens_per_chunk, loaded.config.cache_spec
    needs = [
        chunks_to_finish(len(request.prompt), request.output_tokens, chunk_size)
        for request in workload.requests
    ]
    codec = codec_for(config.codec, loaded.model)
    selector = chosen_selector(config, loaded.model)
    clusters = chosen_clusters(config.clusters, loaded.model)
    how: Any = {"codec": codec, "selector": selector, "clusters": clusters}
    memory = config.pool_memory or DEFAULT_MEMORY
    sizes = {"chunk_size": chunk_size, "dtype": config.dtype}
    _, within = pool_within(memory, spec, config.max_running, **sizes, **how)
    num_chunks = config.pool_chunks
    if num_chunks is None:
        num_chunks = within if config.pool_memory else min(within, bucket(sum(needs)))
    if max(needs) > num_chunks:
        raise UserError(
            f"the largest request takes {max(needs)} chunks of {chunk_size} tokens and the pool "
            f"has {num_chunks}: choose more by --pool-chunks or --pool-memory, or a larger --scale"
        )
    return CacheConfig(num_chunks, chunk_size, config.dtype, **how)


def warm_up(
    side: Side, config: ServeConfig, loaded: LoadedModel, workload: Workload, cache: CacheConfig
) -> None:
    """Serve some of the workload with an engine that is then thrown away, to compile programs."""
    engine = _engine(side, config, loaded, cache)
    replay(engine, workload.requests, at_once=config.at_once, for_seconds=config.warm_up)


def run_side(
    side: Side,
    config: ServeConfig,
    loaded: LoadedModel,
    workload: Workload,
    cache: CacheConfig,
    *,
    on_served: Callable[[Served], None],
    on_turn: Callable[[int], None],
) -> Replayed:
    """Serve the workload by `side`'s policy, from an empty cache."""
    return replay(
        _engine(side, config, loaded, cache),
        workload.requests,
        at_once=config.at_once,
        on_served=on_served,
        on_turn=on_turn,
    )


def _engine(side: Side, config: ServeConfig, loaded: LoadedModel, cache: CacheConfig) -> Engine:
    options: dict[str, Any] = POLICIES[side]
    return Engine(
        loaded.model,
        cache,
        max_running=config.max_running,
        steps_per_call=config.steps_per_call,
        prefill_tokens=config.prefill_tokens,
        implementation=config.implementation,
        mesh=chosen_mesh(config.mesh),
        **options,
    )
