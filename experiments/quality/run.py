"""The work of `quality`: every dtype and path scored, each kept as it is done."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.inputs import check_unchanged
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.prompts import read_text, shipped_asset, tokens_of
from experiments.quality.config import QualityConfig, sizes_of
from experiments.quality.measures import PATHS, measures_of
from experiments.quality.scoring import (
    Passage,
    Scores,
    SharedScorer,
    passage_tokens,
    score_by_engine,
    score_plain,
)
from models import LoadedModel

_SETTING = ("model", "prefix", "window", "windows", "chunk_size", "seed")
_DIGITS = 7  # of a log-probability, behind the point: as many as float32 has


@compilation_cache()
def measure(config: QualityConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = shipped_text() if config.text is None else read_text(config.text, "text")
    folder.begin(environment)
    sizes = sizes_of(config)
    scoring = _Scoring(config, source, text, folder.inputs)
    units = {
        f"{dtype}, {path}": functools.partial(scoring.score, dtype, path)
        for dtype in sizes.dtypes
        for path in PATHS
    }
    records = measure_units(folder, units, "score")
    measures = measures_of(records)
    plan = next(record["plan"] for record in records if "plan" in record)
    summary = {
        "experiment": "quality",
        **{name: getattr(config, name) for name in _SETTING},
        "text": "shipped" if config.text is None else config.text.name,
        "text_tokens": records[0]["text_tokens"],
        "scored_tokens": sizes.window * sizes.windows,
        "plan": plan,
        "dtypes": [
            {
                "dtype": dtype,
                "paths": {one.path: _values(one) for one in measures if one.dtype == dtype},
            }
            for dtype in sizes.dtypes
        ],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def shipped_text() -> str:
    """The system prompt and the questions that ship with the project."""
    return f"{shipped_asset('system_prompt.md').strip()}\n\n{shipped_asset('questions.txt')}"


class _Scoring:
    """Holds one model and its scorer at a time, made when first needed."""

    def __init__(
        self, config: QualityConfig, source: ModelSource, text: str, inputs: Mapping[str, str]
    ) -> None:
        self._config = config
        self._text = text
        self._source = source
        self._inputs = inputs
        self._dtype: str | None = None
        self._loaded: LoadedModel | None = None
        self._scorer: SharedScorer | None = None

    def score(self, dtype: str, path: str) -> Record:
        loaded = self._load(dtype)
        tokens = tokens_of(loaded, self._text)
        passage = self._passage(loaded, tokens)
        began = time.perf_counter()
        record: Record = {
            "kind": "score",
            "dtype": dtype,
            "path": path,
            "text_tokens": len(tokens),
        }
        if path == "plain":
            scores = score_plain(loaded.model, passage, dtype)
        else:
            scorer, how = self._shared(loaded, passage, dtype), self._how(dtype)
            if path == "prefill":
                scores = score_by_engine(loaded.model, passage, **how)
            else:
                scores = scorer.decode()
            record |= {
                "plan": dataclasses.asdict(scorer.plan_summary),
                "kv_bytes_held": scorer.kv_bytes_held,
                "kv_bytes_unshared": scorer.kv_bytes_unshared,
            }
        return record | {
            **_lists(scores),
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _load(self, dtype: str) -> LoadedModel:
        if self._loaded is None or self._dtype != dtype:
            self._scorer = self._loaded = None  # two models might be more than fits
            config = self._config
            options = LoadOptions(dtype, config.seed, config.max_positions, chosen_heads(config))
            self._loaded, self._dtype = load_model(self._source, options), dtype
            check_unchanged(self._inputs, config)  # each type is loaded minutes after the last
        return self._loaded

    def _shared(self, loaded: LoadedModel, passage: Passage, dtype: str) -> SharedScorer:
        if self._scorer is None:
            scorer = SharedScorer(loaded.model, passage, **self._how(dtype))
            if not scorer.plan_summary.shared:
                raise UserError(
                    f"the plan shares nothing, so there is nothing to compare: "
                    f"{scorer.plan_summary.reason}; choose more --windows or a longer --prefix"
                )
            self._scorer = scorer
        return self._scorer

    def _how(self, dtype: str) -> dict[str, Any]:
        config = self._config
        return {
            "dtype": dtype,
            "chunk_size": config.chunk_size,
            "prefill_tokens": config.prefill_tokens,
            "implementation": config.implementation,
        }

    def _passage(self, loaded: LoadedModel, tokens: list[int]) -> Passage:
        config = self._config
        sizes = sizes_of(config)
        shape = sizes.prefix, sizes.window, sizes.windows
        positions, needed = sizes.prefix + sizes.window, passage_tokens(*shape)
        if positions > loaded.config.max_positions:
            raise UserError(
                f"--prefix and --window make {positions} positions, {config.model} has "
                f"{loaded.config.max_positions}"
            )
        if needed > len(tokens):
            raise UserError(
                f"the text has {len(tokens):,} tokens of {config.model}; --prefix, --window and "
                f"--windows take {needed:,}: choose fewer, or a longer --text"
            )
        return Passage.of(tokens, *shape)


def _lists(scores: Scores) -> Record:
    return {
        "logprobs": [[round(one, _DIGITS) for one in row] for row in scores.logprobs.tolist()],
        "greedy": scores.greedy.tolist(),
    }


def _values(measures: Any) -> Record:
    fields = dataclasses.asdict(measures)
    return {name: fields[name] for name in fields if name not in ("dtype", "path")}
