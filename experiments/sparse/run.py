"""The work of `sparse`: one context after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.harness import timing
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.select_option import named_selector
from experiments.sparse import products
from experiments.sparse.choosing import Choosing, alike
from experiments.sparse.config import PREFILL_TOKENS, PRIVATE_TOKENS, SparseConfig
from jax_chunkattn import CacheConfig, CacheSpec
from jax_chunkattn.device.backend import choose_backend
from jax_chunkattn.planning.planner import plan_decode
from jax_chunkattn.planning.prefill import QUERY_TILE, Segment, pack_segments
from pallas_kernels import PrefillPlan, chunk_attention, prefill_attention
from pallas_kernels.windows import Window

Call = Callable[[], jax.Array]


@compilation_cache()
def measure(config: SparseConfig, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    environment = describe_environment()
    folder.begin(environment)
    units = {
        f"{context} tokens": partial(_measure_context, config, context)
        for context in config.contexts
    }
    summary = {
        "experiment": "sparse",
        "contexts": measure_units(folder, units, "contexts"),
        "prefill_tokens": PREFILL_TOKENS,
        **{
            name: getattr(config, name)
            for name in (
                "layers",
                "rows",
                "heads",
                "head_dim",
                "chunk_size",
                "agreement",
                "repeats",
                "seed",
            )
        },
        "environment": environment,
    }
    return finish(folder, summary)


def _measure_context(config: SparseConfig, context: int) -> dict[str, Any]:
    """Decoding behind this many tokens, and the prefill of the last of them."""
    windows = [None, *(Window(size) for size in sorted(config.windows, reverse=True))]
    shared = context // config.chunk_size
    own = -(-PRIVATE_TOKENS // config.chunk_size)
    num_chunks = shared + config.rows * own
    query_heads, kv_heads = config.num_heads
    random = np.random.default_rng(config.seed)
    shape = (config.layers, kv_heads, num_chunks, config.chunk_size, config.head_dim)
    keys, values = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(2))
    queries = alike(random, config.rows, (query_heads, config.head_dim), config.agreement)
    tokens = random.standard_normal((PREFILL_TOKENS, query_heads, config.head_dim), np.float32)

    calls: dict[str, Call] = {}
    reads: dict[str, int] = {}
    ids = random.permutation(num_chunks)
    ends = ids[shared:].reshape(config.rows, own)
    tables = [[*ids[:shared].tolist(), *end] for end in ends.tolist()]
    lengths = [context + PRIVATE_TOKENS] * config.rows
    whole = Segment(
        [0] * PREFILL_TOKENS,
        ids[:shared].tolist(),
        context - PREFILL_TOKENS,
        context,
        context - PREFILL_TOKENS,
    )
    spec = CacheSpec(config.layers, kv_heads, config.head_dim, query_heads)
    options = choose_backend(spec, CacheConfig(num_chunks, config.chunk_size)).planner
    sizes: Any = {
        "chunk_size": config.chunk_size,
        "num_chunks": num_chunks,
        "options": options,
    }
    for window in windows:
        by_window = () if window is None else (window,)
        plan, found = plan_decode(tables, lengths, windows=by_window, **sizes)
        padded = np.zeros(plan.num_rows, np.int32)
        padded[: config.rows] = lengths
        q = jnp.asarray(np.pad(queries, ((0, plan.num_rows - config.rows), (0, 0), (0, 0))))
        decoding = jax.device_put((q, keys, values, plan, padded))
        calls[f"decode {_name(window)}"] = partial(_decode, *decoding)
        reads[f"decode {_name(window)}"] = found.chunk_reads
        batch = pack_segments([whole], num_tokens=PREFILL_TOKENS, windows=by_window, **sizes)
        prefilling = jax.device_put((jnp.asarray(tokens), keys, values, batch.plan))
        calls[f"prefill {_name(window)}"] = partial(_prefill, *prefilling)
        reads[f"prefill {_name(window)}"] = _prefill_reads(batch.plan, context, config.chunk_size)
    for choice in config.select:
        choosing = Choosing.of(
            named_selector(choice), spec, keys, values, tables, lengths[0], whole
        ).all_chosen(q)
        calls[f"decode {choice}"] = partial(choosing.decode, q)
        calls[f"prefill {choice}"] = partial(choosing.prefill, jnp.asarray(tokens))
        reads[f"decode {choice}"] = choosing.chunk_reads(q)
    positions, sides = np.arange(context - PREFILL_TOKENS, context), {}
    for window in windows:
        size = None if window is None else window.size
        sides[_name(window)] = {"window": size, "products": products.of_window(size, positions)}
    for choice in config.select:
        work = products.of_selector(named_selector(choice), positions, config.chunk_size)
        sides[choice] = {"select": choice, "products": work}
    timings, _ = timing.time_in_turns(calls, config.repeats, seed=config.seed)
    return {
        "kind": "context",
        "tokens": context,
        "sides": [
            {
                **side,
                **{
                    phase: {
                        **dataclasses.asdict(timings[f"{phase} {name}"]),
                        "chunk_reads": reads.get(f"{phase} {name}"),
                    }
                    for phase in ("decode", "prefill")
                },
            }
            for name, side in sides.items()
        ],
    }


def _name(window: Window | None) -> str:
    return "all" if window is None else str(window.size)


def _prefill_reads(plan: PrefillPlan, end: int, chunk_size: int) -> int:
    """Chunks that items read, and that the sequence reads beside them."""
    own = -(-end // chunk_size) - int(np.ravel(plan.own_chunk)[0])
    return int(np.sum(plan.items.chunk_count)) + own


@jax.jit
def _decode(q, keys, values, plan, lengths) -> jax.Array:
    return _sum_of_layers(partial(chunk_attention, q, keys, values, plan, lengths), q, keys)


@jax.jit
def _prefill(q, keys, values, plan) -> jax.Array:
    attend = partial(prefill_attention, q, keys, values, plan, query_tile=QUERY_TILE)
    return _sum_of_layers(attend, q, keys)


def _sum_of_layers(attend: Callable[..., jax.Array], q: jax.Array, keys: jax.Array) -> jax.Array:
    def add(layer: jax.Array, total: jax.Array) -> jax.Array:
        return total + attend(layer=layer)

    return lax.fori_loop(0, len(keys), add, jnp.zeros_like(q))
