"""The records of a `generate` run: its header, one for each request and side, and its summary."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from experiments.generate.config import GenerateConfig
from experiments.generate.decoding import Measured
from experiments.prompts import PromptSet

if TYPE_CHECKING:
    from jax_chunkattn import RequestHandle


THIS_RUN, UNSHARED = "this run", "without sharing"
"""The units of a run."""


def setting_of(prompts: PromptSet) -> dict[str, Any]:
    """What the header says besides the config: with it the prompts can be put together again."""
    return {
        "note": prompts.note,
        "common_prefix_tokens": list(prompts.tokens[0][: prompts.common_prefix]),
    }


def measured_record(measured: Measured, **more: Any) -> dict[str, Any]:
    """The line that ends a unit."""
    return {"kind": "measured", **dataclasses.asdict(measured), **more}


def measured_of(record: dict[str, Any]) -> Measured:
    """What `measured_record` made a line of."""
    names = [one.name for one in dataclasses.fields(Measured)]
    fields: dict[str, Any] = {name: record[name] for name in names if name in record}
    fields["answers"] = tuple(map(tuple, record["answers"]))
    return Measured(**fields)


def request_record(
    index: int, prompts: PromptSet, request: RequestHandle, text: str | None
) -> dict[str, Any]:
    """A request's line: its prompt is the run's common prefix followed by `prompt_suffix_tokens`.

    `finish_reason` is null for a request that was interrupted.
    """
    prompt = prompts.tokens[index]
    return {
        "kind": "request",
        "index": index,
        "prompt": prompts.lines[index].text,
        "prompt_tokens": len(prompt),
        "prompt_suffix_tokens": list(prompt[prompts.common_prefix :]),
        "text": text,
        "tokens": list(request.tokens),
        "finish_reason": request.finish_reason,
    }


def summarise(
    config: GenerateConfig,
    environment: dict[str, Any],
    measured: Measured,
    unshared: Measured | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The summary of a run, JSON values only: what `summary.json` and the last line hold."""
    return {
        "experiment": "generate",
        "model": config.model,
        "dtype": config.dtype,
        "chunk_size": config.chunk_size,
        "codec": config.codec,
        "select": config.select,
        "keep": config.keep,
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "sharing": config.sharing,
        **_numbers(measured),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "compare": None if unshared is None else _comparison(config, measured, unshared),
        "environment": environment,
    }


def _numbers(measured: Measured) -> dict[str, Any]:
    return {
        "implementation": measured.implementation,
        "plan": measured.plan_decision,
        "batch": measured.batch,
        "shared_tokens": measured.shared_tokens,
        "prompt_tokens": measured.prompt_tokens,
        "prefill_tokens_computed": measured.prefill_tokens_computed,
        "prefill_tokens_reused": measured.prefill_tokens_reused,
        "prompt_tokens_per_second": round(measured.prompt_tokens_per_second, 3),
        "prefill_tokens_per_second": round(measured.prefill_tokens_per_second, 3),
        "decode_tokens": measured.decode_tokens,
        "decode_tokens_per_second": round(measured.decode_tokens_per_second, 3),
        "kv_bytes_held": measured.kv_bytes_held,
        "kv_bytes_unshared": measured.kv_bytes_unshared,
        "compilations": measured.compilations,
        "compilations_from_cache": measured.compilations_from_cache,
        "max_rss_bytes": measured.max_rss_bytes,
        "reads": measured.reads,
    }


def _comparison(config: GenerateConfig, measured: Measured, unshared: Measured) -> dict[str, Any]:
    """The run without sharing, and the main run's rates over its rates.

    `equal_answers` counts its answers that are the main run's, token by token; None when sampling,
    where the batch may change what is drawn.
    """
    pairs = zip(measured.answers, unshared.answers, strict=False)
    equal = sum(mine == other for mine, other in pairs)
    return {
        **_numbers(unshared),
        "seconds": {
            "compile": round(unshared.compile_seconds, 3),
            "prefill": round(unshared.prefill_seconds, 3),
            "decode": round(unshared.decode_seconds, 3),
        },
        "prompt_rate_ratio": _ratio(
            measured.prompt_tokens_per_second, unshared.prompt_tokens_per_second
        ),
        "decode_rate_ratio": _ratio(
            measured.decode_tokens_per_second, unshared.decode_tokens_per_second
        ),
        "equal_answers": equal if config.temperature == 0 else None,
    }


def _ratio(value: float, other: float) -> float | None:
    return round(value / other, 3) if other else None
