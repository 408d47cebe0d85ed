"""The work of `minor`: the answers, then one after another what could be dropped of them."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np

from experiments.generate.decoding import BatchSettings, decode_batch
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.inputs import check_unchanged
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.minor.config import MinorConfig
from experiments.minor.dropping import drop_times, shares
from experiments.prompts import PromptSet, make_prompts, read_prompts, read_system_prompt
from jax_chunkattn import SamplingParams
from models import LoadedModel
from pallas_kernels.codecs import IDENTITY

MEASURES = ("head_tokens", "own_head_tokens", "kv_head_tokens", "kv_head_chunks", "layer_chunks")
MEASURES += ("model_chunks",)
"""What is dropped as one: a token in a query head, of all tokens as in the paper and of the answer;
a token in a KV head; a chunk in a KV head, in all heads of a layer, in the whole model."""


@compilation_cache()
def measure(config: MinorConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    environment = describe_environment()
    lines = read_prompts(config.prompts)[: config.rows]
    system_prompt = read_system_prompt(config.system_prompt)
    loaded = load_model(source, LoadOptions(seed=config.seed, max_positions=config.max_positions))
    check_unchanged(folder.inputs, config)
    if loaded.model.cache_spec.different_windows:
        raise UserError(f"{loaded.name} has windows, which drop keys by themselves")
    prompts = make_prompts(
        lines, system_prompt, loaded, max_tokens=config.max_tokens, seed=config.seed
    )
    folder.begin(environment)
    decoding = functools.partial(_decode, config, loaded, prompts)
    [decoded] = measure_units(folder, {"answers": decoding}, "decode")
    rows = {
        f"answer {row}": functools.partial(_measure_row, config, loaded, prompts, row, answer)
        for row, answer in enumerate(decoded["answers"])
    }
    records = measure_units(folder, rows, "measure")
    summary = {
        "experiment": "minor",
        **{name: getattr(config, name) for name in ("model", "max_tokens", "temperature", "seed")},
        "rows": len(records),
        "shared_tokens": prompts.common_prefix,
        "tokens": [record["tokens"] for record in records],
        "measured": _mean_of(records),
        "environment": environment,
    }
    return finish(folder, summary)


def _decode(config: MinorConfig, loaded: LoadedModel, prompts: PromptSet) -> Record:
    began = time.perf_counter()
    settings = BatchSettings(
        chunk_size=64,
        codec=IDENTITY,
        selector=None,
        clusters=None,
        dtype="float32",
        sharing=True,
        implementation=None,
        steps_per_call=32,
        stop_tokens=(),
    )
    sampling = [
        SamplingParams(config.max_tokens, temperature=config.temperature, seed=config.seed + row)
        for row in range(len(prompts.tokens))
    ]
    names = [line.where for line in prompts.lines]
    measured = decode_batch(loaded.model, prompts.tokens, sampling, settings, names=names)
    seconds = round(time.perf_counter() - began, 3)
    return {"kind": "answers", "answers": measured.answers, "seconds": seconds}


def _measure_row(
    config: MinorConfig, loaded: LoadedModel, prompts: PromptSet, row: int, answer: list[int]
) -> Record:
    """What could be dropped while this answer was decoded."""
    began = time.perf_counter()
    prompt = prompts.tokens[row]
    tokens = [*prompt, *answer[:-1]]  # the last one is never read
    by_query, by_kv = drop_times(loaded.model, tokens, config.recent)
    measured = []
    for recent, heads, kv_heads in zip(config.recent, by_query, by_kv, strict=True):
        for size in config.chunk_sizes:
            first = prompts.common_prefix // size * size
            layers = kv_heads.max(axis=1)
            places: Any = {"first": first, "begin": len(prompt)}
            found = (
                shares(heads, 1, first=0, begin=len(prompt)),
                shares(heads, 1, **places),
                shares(kv_heads, 1, **places),
                shares(kv_heads, size, **places),
                shares(layers, size, **places),
                shares(layers.max(axis=0), size, **places),
            )
            named = dict(zip(MEASURES, found, strict=True))
            measured.append({"recent": recent, "chunk_size": size, **named})
    return {
        "kind": "row",
        "row": row,
        "prompt_tokens": len(prompt),
        "tokens": len(tokens),
        "measured": measured,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _mean_of(records: list[Record]) -> list[Record]:
    """Of all answers, by the recent queries and the size of chunks."""
    means = []
    for of_rows in zip(*(record["measured"] for record in records), strict=True):
        first = of_rows[0]
        mean = {"recent": first["recent"], "chunk_size": first["chunk_size"]}
        for name in MEASURES:
            mean[name] = {
                when: round(float(np.mean([one[name][when] for one in of_rows])), 5)
                for when in ("reads", "end")
            }
        means.append(mean)
    return means
