"""The cache experiment itself: one unit for each policy and chunk size."""

from __future__ import annotations

import time
from functools import cached_property, partial
from typing import Any

from experiments.cache.config import CacheConfig
from experiments.cache.made_up import make_up
from experiments.cache.policies import SIMULATED
from experiments.cache.recency import replay_free_at_once, replay_lru, replay_unbounded
from experiments.cache.simulation import simulate
from experiments.cache.touches import Replay, Touches, count_refused, find_touches
from experiments.cache.workload import Workload, read_workload
from experiments.codecs import codec_named
from experiments.harness.environment import describe_deviceless
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish

NO_BOUND = "no bound"


def measure(config: CacheConfig, folder: ResultFolder) -> dict[str, Any]:
    """Replay the workload with every policy and chunk size; returns the summary."""
    started = time.perf_counter()
    workload = _make_workload(config)
    environment = describe_deviceless()
    setting = {
        "workload": workload.name,
        "num_requests": len(workload.paths),
        "prompt_tokens": int(workload.prompt_tokens.sum()),
        "longest_prompt": int(workload.prompt_tokens.max()),
        "distinct_tokens": workload.distinct_tokens,
    }
    folder.begin(environment, **setting)
    replays = _Replays(config, workload)
    units = {
        f"{policy}, chunks of {chunk_size}": partial(replays.measure, policy, chunk_size)
        for chunk_size in config.chunk_sizes
        for policy in (NO_BOUND, *config.policies)
    }
    units |= {
        f"{codec}, chunks of {chunk_size}": partial(replays.measure_codec, codec, chunk_size)
        for chunk_size in config.chunk_sizes
        for codec in config.codec
    }
    measured = measure_units(folder, units, "replays")
    records = [record for record in measured if record["kind"] == "replays"]
    coded = [record for record in measured if record["kind"] == "codec"]
    summary = {
        "experiment": "cache",
        **setting,
        "chunk_sizes": list(config.chunk_sizes),
        "pool_tokens": list(config.pool_tokens),
        "in_use": list(config.in_use),
        "seed": config.seed,
        "hit_rates": [_hit_rates(records, chunk_size) for chunk_size in config.chunk_sizes],
        "codec_hit_rates": [_codec_hit_rates(record) for record in coded],
        "seconds": round(time.perf_counter() - started, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _make_workload(config: CacheConfig) -> Workload:
    return read_workload(config.trace, config.requests) if config.trace else make_up(config)


class _Replays:
    """Replays one workload; what its policies have in common is found once."""

    def __init__(self, config: CacheConfig, workload: Workload) -> None:
        self._config = config
        self._workload = workload
        self._touches: dict[tuple[int, int], Touches] = {}

    def measure(self, policy: str, chunk_size: int) -> Record:
        """The record of a policy and chunk size: a replay for each pool, or number in use."""
        begin = time.perf_counter()
        replays = self._replay(policy, chunk_size)
        seconds = time.perf_counter() - begin
        return {
            "kind": "replays",
            "policy": policy,
            "chunk_size": chunk_size,
            "replays": [self._record(replay, chunk_size) for replay in replays],
            "seconds": seconds,
            "tokens_per_second": len(replays) * self._prompt_tokens / seconds,
        }

    def measure_codec(self, codec: str, chunk_size: int) -> Record:
        """LRU's record in pools of the bytes that the sizes asked for take in float16."""
        times = tokens_in_the_same_bytes(codec, chunk_size, self._config.head_dim)
        pools = [int(tokens * times) // chunk_size for tokens in self._config.pool_tokens]
        replays = replay_lru(self._workload, chunk_size, pools)
        return {
            "kind": "codec",
            "codec": codec,
            "chunk_size": chunk_size,
            "times_as_many_tokens": times,
            "replays": [self._record(replay, chunk_size) for replay in replays],
        }

    def _replay(self, policy: str, chunk_size: int) -> list[Replay]:
        pools = [tokens // chunk_size for tokens in self._config.pool_tokens]
        if policy == NO_BOUND:
            return [replay_unbounded(self._workload, chunk_size)]
        if policy == "lru":
            return replay_lru(self._workload, chunk_size, pools)
        if policy == "free-at-once":
            return replay_free_at_once(self._workload, chunk_size, self._config.in_use)
        chosen = SIMULATED[policy]
        return [simulate(self._find_touches(chunk_size, pool), pool, chosen) for pool in pools]

    def _find_touches(self, chunk_size: int, pool: int) -> Touches:
        key = chunk_size, count_refused(self._workload, chunk_size, pool)
        if key not in self._touches:
            self._touches[key] = find_touches(self._workload, chunk_size, pool)
        return self._touches[key]

    def _record(self, replay: Replay, chunk_size: int) -> Record:
        hit_tokens = replay.hit_chunks * chunk_size
        pool = replay.pool_chunks
        return {
            "pool_tokens": None if pool is None else pool * chunk_size,
            "hit_tokens": hit_tokens,
            "hit_rate": hit_tokens / self._prompt_tokens,
            "requests_hit": replay.requests_hit,
            "refused": replay.refused,
            "evicted_chunks": replay.evicted_chunks,
        }

    @cached_property
    def _prompt_tokens(self) -> int:
        return int(self._workload.prompt_tokens.sum())


def tokens_in_the_same_bytes(name: str, chunk_size: int, head_dim: int) -> float:
    """How many times the tokens of a float16 pool one of the same bytes holds with a codec."""
    codec = codec_named(name)
    if codec is None:
        return 1.0
    return 2 * chunk_size * head_dim * 2 / codec.head_bytes(chunk_size, head_dim)


def _codec_hit_rates(record: Record) -> Record:
    kept = {name: record[name] for name in ("codec", "chunk_size", "times_as_many_tokens")}
    return {**kept, "lru": [round(replay["hit_rate"], 6) for replay in record["replays"]]}


def _hit_rates(records: list[Record], chunk_size: int) -> dict[str, Any]:
    """The hit rates of each policy, in the order of the pools, or of the numbers in use."""
    rates: dict[str, Any] = {
        record["policy"]: [round(replay["hit_rate"], 6) for replay in record["replays"]]
        for record in records
        if record["chunk_size"] == chunk_size
    }
    return {"chunk_size": chunk_size, **rates, NO_BOUND: rates[NO_BOUND][0]}
