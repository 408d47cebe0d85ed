"""A side's replay in numbers: JSON values only, as in `results.jsonl` and `summary.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.chunk_reads import reads_record
from experiments.harness.percentiles import percentiles
from experiments.serve.ideal import IdealHits
from experiments.serve.replay import Replayed, Served
from jax_chunkattn import EngineStats


def request_record(side: str, number: int, served: Served) -> dict[str, Any]:
    """A request's line; times are seconds since the side's replay in round `number` began."""
    return {
        "kind": "request",
        "side": side,
        "round": number,
        "index": served.index,
        "arrival": round(served.arrival, 6),
        "first_token": round(served.first_token, 6),
        "end": round(served.end, 6),
        "prompt_tokens": served.prompt_tokens,
        "hit_tokens": served.hit_tokens,
        "tokens": list(served.tokens),
    }


def served_of(record: Mapping[str, Any]) -> Served:
    """The request that `request_record` made a line of."""
    fields: dict[str, Any] = {one.name: record[one.name] for one in dataclasses.fields(Served)}
    fields["tokens"] = tuple(record["tokens"])
    return Served(**fields)


def side_record(
    side: str,
    number: int,
    replayed: Replayed,
    ideal: IdealHits,
    answers: Sequence[tuple[int, ...]] | None,
) -> dict[str, Any]:
    """A side's line for round `number`; `answers` are the first run's, if this is another.

    Rates of hits are per prompt token, `chunk_hit_rate` of tokens in whole chunks only.
    """
    served, stats = replayed.served, replayed.stats
    seconds = max(one.end for one in served) - min(one.arrival for one in served)
    output_tokens = sum(len(one.tokens) for one in served)
    per_token = (one.seconds_per_output_token for one in served)
    use = stats.prompts
    equal = answers and sum(
        one.tokens == answer for one, answer in zip(served, answers, strict=True)
    )
    return {
        "kind": "side",
        "side": side,
        "round": number,
        "requests": len(served),
        "hit_rate": _share(use.num_found, use.num_tokens),
        "hit_rate_ideal": _share(ideal.tokens, ideal.prompt_tokens),
        "chunk_hit_rate": _share(use.hit, use.num_tokens),
        "chunk_hit_rate_ideal": _share(ideal.tokens_in_chunks, ideal.prompt_tokens),
        "prompt_tokens": {"total": use.num_tokens, **dataclasses.asdict(use)},
        "time_to_first_token": percentiles(one.time_to_first_token for one in served),
        "seconds_per_output_token": percentiles(x for x in per_token if x is not None),
        "normalised_latency": percentiles(one.normalised_latency for one in served),
        "seconds": round(seconds, 3),
        "requests_per_second": _rate(len(served), seconds),
        "prompt_tokens_per_second": _rate(use.num_tokens, seconds),
        "output_tokens_per_second": _rate(output_tokens, seconds),
        "peak_kv_bytes": stats.kv_bytes_held,
        "peak_kv_bytes_unshared": stats.kv_bytes_unshared,
        "peak_running": replayed.most_running,
        "peak_waiting": replayed.most_waiting,
        "evictions": stats.evictions,
        "preemptions": stats.preemptions,
        "reads": reads_record(stats),
        "engine": _engine_times(stats),
        "equal_answers": equal,
    }


def ratios(record: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    """A side's numbers over the base's: rates above 1 and times below 1 are better."""
    shown: dict[str, float | None] = {}
    for name in ("time_to_first_token", "seconds_per_output_token", "normalised_latency"):
        for which in ("mean", "p50", "p90"):
            mine, other = record[name], base[name]
            shown[f"{name}_{which}"] = mine and other and _ratio(mine[which], other[which])
    for name in ("requests_per_second", "output_tokens_per_second", "peak_kv_bytes"):
        shown[name] = _ratio(record[name], base[name])
    return shown


def spread(rounds: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float] | None]:
    """Median, least and most of each number over rounds; None where a round has none."""
    shown: dict[str, dict[str, float] | None] = {}
    for name in rounds[0]:
        values = [value for each in rounds if (value := each[name]) is not None]
        shown[name] = None
        if len(values) == len(rounds):
            median = round(float(np.median(values)), 3)
            shown[name] = {"median": median, "least": min(values), "most": max(values)}
    return shown


def _engine_times(stats: EngineStats) -> dict[str, Any]:
    """Where the time went, and what was compiled meanwhile, for which the clock stood still."""
    return {
        "prefill_tokens": stats.prefill_tokens,
        "prefill_seconds": round(stats.prefill_seconds, 3),
        "prefill_tokens_per_second": _rate(stats.prefill_tokens, stats.prefill_seconds),
        "decode_tokens": stats.decode_tokens,
        "decode_seconds": round(stats.decode_seconds, 3),
        "decode_calls": stats.calls,
        "host_seconds": round(stats.host_seconds, 3),
        "plans": stats.plans,
        "plans_shared": stats.plans_shared,
        "recoveries": stats.recoveries,
        "compilations": stats.compilations,
        "compile_seconds": round(stats.compile_seconds, 3),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3)


def _ratio(value: float, other: float) -> float | None:
    return round(value / other, 3) if other else None
