"""What a model does with a pattern, beside what it does with all of its heads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from experiments.heads.config import HeadsConfig
from experiments.prompts import tokens_of
from experiments.quality.codecs import compare, copied, copy_passage, likeliest
from experiments.quality.config import STRING
from experiments.quality.run_codecs import agreement_lists
from experiments.quality.scoring import Passage, SharedScorer, passage_tokens
from models import Decoder, LoadedModel
from models.head_patterns import HeadPattern, with_pattern


class Table:
    """Measures patterns over the same passages, each made when first needed.

    Everything is computed by prefill over the chunk pool, as an engine does it.
    """

    def __init__(self, config: HeadsConfig, loaded: LoadedModel, text: str) -> None:
        self._config = config
        self._loaded = loaded
        self._text = text

    def measure(self, name: str, pattern: Callable[[], HeadPattern] | None, share: float) -> Record:
        """The record of this share of a pattern's heads; without a pattern of the model as it is.

        `kept_bytes` are what a sequence's heads would have to keep, by its length.
        """
        began = time.perf_counter()
        model = self._loaded.model
        if pattern is not None:
            model = with_pattern(model, pattern(), share)
        hidden = {
            name: self._exact if name == "text" and pattern is None else self._hidden(model, one)
            for name, one in self._passages.items()
        }
        text = self._passages["text"]
        found = compare(self._loaded.model, self._exact, hidden["text"], text.targets)
        size = jnp.dtype(self._config.dtype).itemsize
        lengths = self._config.copy_lengths
        return {
            "kind": "heads",
            "pattern": name,
            "share": share,
            "kept_bytes": {
                str(length): size * model.cache_spec.values_seen(length) for length in lengths
            },
            **agreement_lists(found),
            "copied": {
                str(length): copied(
                    self._passages[str(length)],
                    likeliest(self._loaded.model, hidden[str(length)]),
                )
                for length in lengths
            },
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _hidden(self, model: Decoder, passage: Passage) -> np.ndarray:
        scorer = SharedScorer(
            model,
            passage,
            dtype=self._config.dtype,
            chunk_size=self._config.chunk_size,
            implementation=self._config.implementation,
        )
        return scorer.hidden()

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        return self._hidden(self._loaded.model, self._passages["text"])

    @functools.cached_property
    def _passages(self) -> dict[str, Passage]:
        """The text, and those to copy from by their length."""
        config = self._config
        shape = config.prefix, config.window, config.windows
        scored = passage_tokens(*shape)
        tokens = self._tokens(scored + max(config.copy_lengths))
        passages = {"text": Passage.of(tokens, *shape)}
        for length in config.copy_lengths:
            passages[str(length)] = copy_passage(
                tokens[scored:], length=length, strings=config.copy_strings, seed=config.seed
            )
        return passages

    def _tokens(self, needed: int) -> list[int]:
        config, loaded = self._config, self._loaded
        tokens = tokens_of(loaded, self._text[: len(self._text) // 2])
        if needed > len(tokens):
            raise UserError(
                f"the first half of the text has {len(tokens):,} tokens of {config.model}; "
                f"--prefix, --window, --windows and --copy-lengths take {needed:,}: choose fewer, "
                "or a longer --text"
            )
        most = loaded.config.max_positions
        longest = max(config.prefix + config.window, max(config.copy_lengths) + STRING)
        if longest > most:
            raise UserError(
                f"--prefix with --window, or the longest of --copy-lengths, makes {longest:,} "
                f"positions, {config.model} has {most:,}"
            )
        return tokens
