"""The work of `quality --codec`: every codec scored, each kept as it is done."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.baselines import encoded_at_once
from experiments.codecs import codec_for, codec_named
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
from experiments.prompts import given_text, text_name, tokens_of
from experiments.quality.codecs import (
    Agreement,
    answer_passage,
    compare,
    copied,
    copy_passage,
    likeliest,
)
from experiments.quality.config import QualityConfig, sizes_of
from experiments.quality.measures import codec_measures
from experiments.quality.recall import Recall
from experiments.quality.scoring import Passage, SharedScorer, passage_tokens
from experiments.select_option import given_dense_layers, named_selector
from jax_chunkattn import CacheConfig
from models import LoadedModel
from pallas_kernels.codecs import IDENTITY, AffineCodec, ChunkCodec, CodebookCodec
from pallas_kernels.selection import ChunkSelector

_SETTING = (
    "model",
    "prefix",
    "window",
    "windows",
    "answers",
    "answer_tokens",
    "copy_lengths",
    "copy_strings",
    "chunk_size",
    "seed",
)
_DIGITS = 7
_CHARACTERS = 8  # of text for each token that is needed: more than tokenizers make a token of


@compilation_cache()
def measure(config: QualityConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = given_text(config.text)
    folder.begin(environment)
    scoring = _Scoring(config, source, text, folder.inputs)
    units = {IDENTITY: functools.partial(scoring.score, IDENTITY)}
    for name in config.codec:
        units[name] = functools.partial(scoring.score, name)
        codec = codec_named(name)
        if codec is not None and isinstance(codec.keys, AffineCodec):
            units[f"{name}, as KIVI"] = functools.partial(scoring.score_as, "KIVI", name)
        if codec is not None and isinstance(codec.keys, CodebookCodec):
            units[f"{name}, as KVQuant"] = functools.partial(scoring.score_as, "KVQuant", name)
    for choice in config.select:
        units[f"select {choice}"] = functools.partial(scoring.score, IDENTITY, choice)
    records = measure_units(folder, units, "score")
    summary = {
        "experiment": "quality",
        **{name: getattr(config, name) for name in _SETTING},
        "text": text_name(config.text),
        "scored_tokens": np.asarray(records[0]["logprobs"]).size,
        "codecs": [vars(one) for one in codec_measures(records)],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Scoring:
    """Holds the model, the passages, and what it makes of them without a codec, each made when
    first needed."""

    def __init__(
        self, config: QualityConfig, source: ModelSource, text: str, inputs: Mapping[str, str]
    ) -> None:
        self._config = config
        self._sizes = sizes_of(config)
        self._source = source
        self._text = text
        self._inputs = inputs

    def score(self, name: str, choice: str | None = None) -> Record:
        """With a codec, and where queries choose what they read, as the choice says."""
        began = time.perf_counter()
        model, config = self._loaded.model, self._config
        dense = given_dense_layers(config.dense_layers, model)
        selector = None
        if choice is not None:
            selector = named_selector(choice, whole=0, dense_layers=dense)
        codec = codec_for(name, model)
        cache = CacheConfig(1, config.chunk_size, self._dtype, codec=codec, selector=selector)
        per_token = cache.bytes_per_chunk(model.cache_spec) / config.chunk_size
        text = compare(model, *self._hidden_of("text", cache), self._passages["text"].targets)
        answers = self._likeliest("answers", cache)[:, -config.answer_tokens :]
        expected = self._passages["answers"].targets[:, -config.answer_tokens :]
        copies = {
            name: copied(passage, self._likeliest(name, cache))
            for name, passage in self._passages.items()
            if name.isdigit()
        }
        recall = None
        if selector is not None:
            recall = Recall.of(model, self._passages["text"], selector, config.chunk_size)
        return {
            "kind": "codec",
            "codec": cache.codec_name,
            "reads": "chunks" if selector is None else selector.name,
            "recall": None if recall is None else vars(recall),
            "bytes_per_token": per_token,
            **agreement_lists(text),
            "answers": (answers == expected).tolist(),
            "copied": copies,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def score_as(self, original: str, name: str) -> Record:
        """The text alone, for which no pool is needed."""
        began = time.perf_counter()
        model, passage = self._loaded.model, self._passages["text"]
        codec = codec_named(name)
        assert codec is not None
        hidden = [
            encoded_at_once.hidden_states(
                model,
                jnp.concatenate([passage.prefix, window]),
                codec,
                chunk_size=self._config.chunk_size,
                window=encoded_at_once.KIVI_WINDOW if original == "KIVI" else 0,
            )[len(passage.prefix) :]
            for window in passage.inputs
        ]
        found = compare(model, self._exact["text"], np.asarray(hidden), passage.targets)
        return {
            "kind": "codec",
            "codec": codec.name,
            "reads": f"as {original}",
            **agreement_lists(found),
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _likeliest(self, name: str, cache: CacheConfig) -> np.ndarray:
        return likeliest(self._loaded.model, self._hidden_of(name, cache)[1])

    def _hidden_of(self, name: str, cache: CacheConfig) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states of a passage where all is exact and read, and with this cache."""
        exact = self._exact[name]
        if not cache.whole_chunks:
            return exact, exact
        return exact, self._hidden(self._passages[name], cache.codec, cache.selector)

    def _hidden(
        self, passage: Passage, codec: str | ChunkCodec, selector: ChunkSelector | None = None
    ) -> np.ndarray:
        config = self._config
        scorer = SharedScorer(
            self._loaded.model,
            passage,
            dtype=self._dtype,
            chunk_size=config.chunk_size,
            codec=codec,
            selector=selector,
            prefill_tokens=config.prefill_tokens,
            implementation=config.implementation,
        )
        return scorer.hidden()

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        config = self._config
        options = LoadOptions(self._dtype, config.seed, config.max_positions, chosen_heads(config))
        loaded = load_model(self._source, options)
        check_unchanged(self._inputs, config)
        return loaded

    @property
    def _dtype(self) -> str:
        return self._sizes.dtypes[0]

    @functools.cached_property
    def _exact(self) -> dict[str, np.ndarray]:
        return {name: self._hidden(one, IDENTITY) for name, one in self._passages.items()}

    @functools.cached_property
    def _passages(self) -> dict[str, Passage]:
        """By name; those to copy from by their length."""
        config, sizes = self._config, self._sizes
        shape = sizes.prefix, sizes.window, sizes.windows
        scored = passage_tokens(*shape)
        tokens = self._tokens(scored + max(config.copy_lengths))
        text = Passage.of(tokens, *shape)
        piece = min(config.chunk_size, sizes.window)
        pieces = text.inputs[:, : sizes.window // piece * piece].reshape(-1, piece)
        pieces = pieces[: config.answers]
        passages = {
            "text": text,
            "answers": answer_passage(
                self._loaded.model,
                text.prefix,
                pieces,
                config.answer_tokens,
                chunk_size=config.chunk_size,
                dtype=self._dtype,
            ),
        }
        for length in config.copy_lengths:
            passages[str(length)] = copy_passage(
                tokens[scored:], length=length, strings=config.copy_strings, seed=config.seed
            )
        return passages

    def _tokens(self, needed: int) -> list[int]:
        config, sizes, loaded = self._config, self._sizes, self._loaded
        tokens = tokens_of(loaded, self._text[: _CHARACTERS * needed])
        if needed > len(tokens):
            raise UserError(
                f"the text has {len(tokens):,} tokens of {config.model}; --prefix, --window, "
                f"--windows and --copy-lengths take {needed:,}: choose fewer, or a longer --text"
            )
        most = loaded.config.max_positions
        longest = max(sizes.prefix + sizes.window, max(config.copy_lengths) + 32)
        answers = sizes.prefix + config.chunk_size + config.answer_tokens
        if max(longest, answers) > most:
            raise UserError(
                f"--prefix with --window or --answer-tokens, or the longest of --copy-lengths, "
                f"makes {max(longest, answers):,} positions, {config.model} has {most:,}"
            )
        return tokens


def agreement_lists(found: Agreement) -> Record:
    """What `change_of` needs of a record."""
    return {
        "divergence": _rounded(found.divergence),
        "logprobs": _rounded(found.scores.logprobs),
        "greedy": found.scores.greedy.tolist(),
    }


def _rounded(numbers: np.ndarray) -> list[list[float]]:
    return [[round(one, _DIGITS) for one in row] for row in numbers.tolist()]
