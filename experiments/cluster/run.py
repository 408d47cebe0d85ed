"""The work of `cluster`: an engine measured, a model of its device, and replays over fleets."""

from __future__ import annotations

import functools
import json
import time
from typing import Any

import numpy as np

from experiments.cluster.config import ClusterConfig
from experiments.cluster.device_model import DeviceModel, fit_device, model_of
from experiments.cluster.measured import Measured, points_of
from experiments.cluster.replica import CALL_TOKENS
from experiments.cluster.simulation import Replayed, replay
from experiments.cluster.workload import Workload, make_workload, span_at_load
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.percentiles import percentiles
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import LoadOptions, ModelSource, load_model
from jax_chunkattn import OverloadRule, Router
from jax_chunkattn.replicas.policies import POLICIES

_SETTING = ("load", "pool_tokens", "chunk_size", "max_running", "model", "seed")


@compilation_cache()
def measure(config: ClusterConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    workload = make_workload(config)
    given = _given_device(config)
    environment = describe_environment()
    setting = {
        "workload": workload.name,
        "num_requests": len(workload.arrivals),
        "prompt_tokens": workload.prompt_tokens,
        "longest_prompt": max(one.prompt for one in workload.arrivals),
    }
    folder.begin(environment, **setting)
    device = _measure_device(config, source, folder) if given is None else given
    units = {
        f"{policy}, {replicas} replicas": functools.partial(
            _replay, config, workload, model_of(device), replicas, policy
        )
        for replicas in config.replicas
        for policy in config.policies
    }
    replays = measure_units(folder, units, "replays")
    summary = {
        "experiment": "cluster",
        **setting,
        **{name: getattr(config, name) for name in _SETTING},
        "device": device,
        "replays": replays,
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _given_device(config: ClusterConfig) -> Record | None:
    """The device model of an earlier run, with what tells where it is from."""
    if config.device is None:
        return None
    try:
        summary = json.loads(config.device.read_text(encoding="utf-8"))
        model_of(summary["device"])
        return summary["device"]
    except OSError as error:
        raise UserError(f"--device {config.device} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--device {config.device} is no summary.json of `cluster`: {error!r}"
        ) from error


def _measure_device(config: ClusterConfig, source: ModelSource, folder: ResultFolder) -> Record:
    """Measures an engine, fits a model to it, and lets it tell what a burst of requests takes."""
    points = points_of(config)
    if {*points, "fit", "burst"} <= set(folder.finished):
        return folder.finished["fit"]
    loaded = load_model(source, LoadOptions("float32", config.seed))
    engine = Measured(config, loaded)
    records = measure_units(
        folder,
        {
            name: functools.partial(getattr(engine, kind), **arguments)
            for name, (kind, arguments) in points.items()
        },
        "measuring",
    )
    prefills, decodes = (
        [one for one in records if one["kind"] == kind] for kind in ("prefill", "decode")
    )
    fit = {"kind": "fit", "model": config.model, **fit_device(prefills, decodes, CALL_TOKENS)}
    checks = {"fit": lambda: fit, "burst": lambda: engine.burst(model_of(fit))}
    [fit, _] = measure_units(folder, checks, "checking")
    return fit


def _replay(
    config: ClusterConfig, workload: Workload, device: DeviceModel, replicas: int, policy: str
) -> Record:
    """One policy over one fleet."""
    alone = [
        device.unshared(one.prompt, one.answer, CALL_TOKENS, config.max_running)
        for one in workload.arrivals
    ]
    span = span_at_load(alone, replicas, config.load)
    router = Router(
        POLICIES[policy](),
        chunk_size=config.chunk_size,
        overload=OverloadRule(config.overload_factor, config.overload_slack),
        seed=config.seed,
    )
    began = time.perf_counter()
    replayed = replay(
        workload.stretched(span),
        router,
        device,
        replicas=replicas,
        num_chunks=config.pool_tokens // config.chunk_size,
        max_running=config.max_running,
    )
    return {
        "kind": "replay",
        "policy": policy,
        "replicas": replicas,
        **_measures(replayed),
        "arrivals_span": round(span, 3),
        "real_seconds": round(time.perf_counter() - began, 3),
    }


def _measures(replayed: Replayed) -> Record:
    served, stats = replayed.served, replayed.router
    prompts = sum(one.arrival.prompt for one in served)
    found = sum(one.found or 0 for one in served)
    first = [one.first_token - one.arrival.due for one in served]
    between = [
        (one.finished - one.first_token) / (one.arrival.answer - 1)
        for one in served
        if one.arrival.answer > 1
    ]
    busy = np.array(replayed.busy)
    return {
        "requests": len(served),
        "refused": replayed.refused,
        "hit_rate": round(found / prompts, 5),
        "predicted_hit_rate": round(stats.predicted_tokens / prompts, 5),
        "busy": round(float(busy.mean() / replayed.seconds), 4),
        "busiest_by_mean": round(float(busy.max() / busy.mean()), 4),
        "busy_deviation": round(float(busy.std() / busy.mean()), 4),
        "first_token": percentiles(first, 4),
        "seconds_per_token": percentiles(between, 4),
        "seconds": round(replayed.seconds, 3),
        "evicted_chunks": replayed.evicted,
        "preemptions": replayed.preemptions,
        "matched": stats.matched,
        "overloaded": stats.overloaded,
        "passed_by": stats.passed_by,
        "unmatched": stats.unmatched,
        "map_chunks": stats.map_chunks,
        "events": {"stored": stats.stored, "removed": stats.removed},
        "route_microseconds": round(1e6 * replayed.routing / len(served), 1),
        "apply_microseconds": round(1e6 * replayed.applying / len(served), 1),
    }
