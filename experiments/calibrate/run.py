"""The work of `calibrate`: samples of a text's windows, and codecs fitted to them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.calibrate.config import CalibrateConfig
from experiments.codecs import SUFFIX
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import ModelSource
from experiments.over_text import OverText
from experiments.prompts import python_help, read_text, second_half, text_name, tokens_of
from models import LoadedModel
from models.calibration import (
    Recipe,
    Samples,
    fit,
    key_frequencies,
    ladder,
    recipe_of,
    sample,
    write_codec,
)

CHUNK_SIZE = 64
"""Of the chunks whose bytes are told."""


@compilation_cache()
def calibrate(config: CalibrateConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = second_half(python_help()) if config.text is None else read_text(config.text, "text")
    folder.begin(environment)
    fitting = _Fitting(config, source, text, folder)
    windows = range(config.windows)
    measure_units(
        folder, {f"window {one}": functools.partial(fitting.read, one) for one in windows}, "read"
    )
    recipes = dict(_recipes(config))
    fitted = measure_units(
        folder,
        {name: functools.partial(fitting.fit, name, recipe) for name, recipe in recipes.items()},
        "fit",
    )
    for one in windows:
        fitting.samples_path(one).unlink(missing_ok=True)
    summary = {
        "experiment": "calibrate",
        **{name: getattr(config, name) for name in ("model", "windows", "window", "stride")},
        "text": text_name(config.text),
        "outliers": config.outliers,
        "codecs": [
            {name: one[name] for name in ("codec", "file", "bytes_per_token")} for one in fitted
        ],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _recipes(config: CalibrateConfig) -> Iterator[tuple[str, Recipe]]:
    """By the names of their files."""
    if config.ladder is None:
        for name in config.codec:
            yield name.replace("/", "-"), recipe_of(name, config.outliers)
    else:
        for step, recipe in enumerate(ladder(config.ladder)):
            yield f"step-{step}", recipe


class _Fitting(OverText[CalibrateConfig]):
    """Holds the model and the samples, each made when first needed."""

    def read(self, window: int) -> Record:
        began = time.perf_counter()
        config = self._config
        spare = len(self._tokens) - config.window
        begin = spare * window // max(1, config.windows - 1)
        tokens = self._tokens[begin : begin + config.window]
        found = sample(self._loaded.model, tokens, config.stride)
        path = self.samples_path(window)
        with path.open("wb") as file:
            np.savez(file, **vars(found))
        return {
            "kind": "window",
            "begin": begin,
            "sampled": len(found.positions),
            "seconds": round(time.perf_counter() - began, 3),
        }

    def fit(self, name: str, recipe: Recipe) -> Record:
        began = time.perf_counter()
        model, spec = self._loaded.model, self._loaded.config.cache_spec
        codec = fit(recipe, self._samples, key_frequencies(self._loaded.config))
        path = self._folder.path / f"{name}{SUFFIX}"
        write_codec(path, codec, model)
        of_head = codec.head_bytes(CHUNK_SIZE, spec.head_dim)
        return {
            "kind": "codec",
            "codec": codec.name,
            "file": path.name,
            "bytes_per_token": of_head * spec.num_layers * spec.num_kv_heads / CHUNK_SIZE,
            "float16_bytes_per_token": 2 * spec.values_per_token,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def samples_path(self, window: int) -> Path:
        """Where the samples of a window are kept until all codecs are fitted."""
        return self._folder.path / f"window-{window:03}.npz"

    @functools.cached_property
    def _samples(self) -> Samples:
        parts = []
        for window in range(self._config.windows):
            path = self.samples_path(window)
            try:
                with np.load(path) as arrays:
                    parts.append(Samples(**arrays))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path}, which this run has left, cannot be read ({error}); begin anew with "
                    "--fresh"
                ) from error
        return Samples.join(parts)

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        config, loaded = self._config, self.loaded
        if config.window > loaded.config.max_positions:
            raise UserError(
                f"--window makes {config.window:,} positions, {config.model} has "
                f"{loaded.config.max_positions:,}"
            )
        return loaded

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        tokens = tokens_of(self._loaded, self._text)
        if len(tokens) < self._config.window:
            raise UserError(
                f"the text has {len(tokens):,} tokens of {self._config.model}, --window takes "
                f"{self._config.window:,}: choose a shorter one, or a longer --text"
            )
        return np.asarray(tokens, np.int32)
