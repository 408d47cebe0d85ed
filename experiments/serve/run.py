"""The work of `serve`: load, make the requests, serve them by each side, show, write."""

from __future__ import annotations

import time
from typing import Any

from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment, max_rss_bytes
from experiments.harness.progress import phase_display
from experiments.harness.results import ResultFolder
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, load_model
from experiments.mesh_option import chosen_mesh
from experiments.serve.config import ServeConfig
from experiments.serve.inputs import Inputs
from experiments.serve.rounds import Rounds
from experiments.serve.sides import pool_for
from experiments.serve.workload import Workload, made_up_workload, trace_workload
from experiments.trace import ideal_block_hit_rate
from jax_chunkattn import CacheConfig
from models import LoadedModel
from pallas_kernels.implementations import check_device


@compilation_cache()
def serve(
    config: ServeConfig, inputs: Inputs, folder: ResultFolder, started: float
) -> dict[str, Any]:
    """Run the experiment into `folder`; `started` is the clock when the user's wait began."""
    check_device(config.implementation)
    environment = describe_environment()
    heads, mesh = chosen_heads(config), chosen_mesh(config.mesh)
    options = LoadOptions(config.dtype, config.seed, config.max_positions, heads, mesh)
    loaded = load_model(inputs.model, options)
    workload = make_workload(config, inputs, loaded)
    cache = pool_for(config, loaded, workload)
    setting = describe_setting(config, inputs, workload, cache)
    folder.begin(environment, **setting)
    with phase_display() as display:
        rounds = Rounds(config, loaded, workload, cache, folder, display)
        rounds.run()
    typical = [rounds.typical(side) for side in config.sides]
    summary = {
        "experiment": "serve",
        "model": config.model,
        **setting,
        "sides": [run.record for run in typical],
        "ratios_to": rounds.base,
        "ratios": {side: rounds.ratios(side) for side in config.sides},
        "seconds": round(time.perf_counter() - started, 3),
        "max_rss_bytes": max_rss_bytes(),
        "environment": environment,
    }
    return finish(folder, summary)


def make_workload(config: ServeConfig, inputs: Inputs, loaded: LoadedModel) -> Workload:
    limits = {
        "vocab_size": loaded.config.vocab_size,
        "max_positions": loaded.config.max_positions,
    }
    if inputs.trace is None:
        return made_up_workload(config, **limits)
    return trace_workload(inputs.trace, config, **limits)


def describe_setting(
    config: ServeConfig, inputs: Inputs, workload: Workload, cache: CacheConfig
) -> dict[str, Any]:
    """What every number of the run depends on, in words where a picture shows it."""
    if inputs.trace is None:
        requests = f"made up, system prompts: {config.system_prompts}"
        scaling = f"1 token stands for {config.scale}"
        blocks_ideal = None
    else:
        requests = "trace"
        if config.every > 1:
            requests += f", one conversation in {config.every}"
        scaling = (
            f"1 token stands for {config.scale} of the trace: "
            f"a block of 512 tokens became {config.block_tokens}"
        )
        blocks_ideal = round(ideal_block_hit_rate(inputs.trace), 4)
    return {
        "requests": requests,
        "num_requests": len(workload.requests),
        "arrivals": _arrivals(config),
        "scaling": scaling,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "cut_prompts": workload.cut_prompts,
        "cut_outputs": workload.cut_outputs,
        "trace_block_hit_rate_ideal": blocks_ideal,
        "chunk_size": cache.chunk_size,
        "codec": cache.codec_name,
        "select": None if cache.selector is None else cache.selector.name,
        "pool_chunks": cache.num_chunks,
        "max_running": config.max_running,
        "at_once": config.at_once,
        "rounds": config.rounds,
        "dtype": config.dtype,
        "seed": config.seed,
    }


def _arrivals(config: ServeConfig) -> str:
    if config.at_once is not None:
        return f"{config.at_once} request{'s' * (config.at_once > 1)} at once"
    if config.rate is not None:
        return f"{config.rate:g} request{'s' * (config.rate != 1)} a second (Poisson)"
    return f"{config.speed:g} seconds of the trace in a second"
