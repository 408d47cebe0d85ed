"""The work of `layers`: one layer after another, and then those that mind most together."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.layers.config import LayersConfig
from experiments.loading import ModelSource
from experiments.over_text import OverText
from experiments.prompts import given_text, text_name, tokens_of
from experiments.quality.codecs import compare
from experiments.quality.scoring import Passage, SharedScorer, passage_tokens
from experiments.select_option import named_selector
from models.dense_layers import DENSE_LAYERS
from pallas_kernels.selection import ChunkSelector

FILE = "dense_layers.json"
_CHARACTERS = 8  # of text for each token that is needed: more than tokenizers make a token of
_SETTING = ("model", "select", "prefix", "window", "windows", "chunk_size", "dtype", "seed")


@compilation_cache()
def measure(config: LayersConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = given_text(config.text)
    folder.begin(environment)
    layers = _Layers(config, source, text, folder)
    every = range(layers.loaded.model.cache_spec.num_layers)
    if config.dense >= len(every):
        raise UserError(f"--dense {config.dense} leaves none of the {len(every)} layers to choose")
    units: dict[str, Callable[[], Record]] = {
        f"layer {layer}": functools.partial(layers.alone, layer) for layer in every
    }
    records = measure_units(folder, units, "measure")
    alone = [record["divergence"] for record in records]
    dense = [int(layer) for layer in np.argsort(alone, kind="stable")[::-1][: config.dense]]
    units = {
        "all choose": functools.partial(layers.reading_all, ()),
        "some read all": functools.partial(layers.reading_all, tuple(dense)),
    }
    all_choose, some_read = measure_units(folder, units, "compare")
    about = {
        "made_by": "jax_chunkattn",
        "model_name": config.model,
        "select": config.select,
        "divergences": alone,
    }
    DENSE_LAYERS.write(folder.path / FILE, dense, layers.loaded.model, about)
    summary = {
        "experiment": "layers",
        **{name: getattr(config, name) for name in _SETTING},
        "text": text_name(config.text),
        "scored_tokens": config.window * config.windows,
        "alone": alone,
        "dense_layers": dense,
        "all_choose": all_choose["divergence"],
        "some_read": some_read["divergence"],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Layers(OverText[LayersConfig]):
    """Measures what a model loses, over one passage, where some of its layers choose."""

    def alone(self, layer: int) -> Record:
        """Where this layer chooses, and all others read everything."""
        others = set(range(self.loaded.model.cache_spec.num_layers)) - {layer}
        return {"kind": "layer", "layer": layer, **self._lost(tuple(sorted(others)))}

    def reading_all(self, layers: tuple[int, ...]) -> Record:
        """Where these layers read everything, and all others choose."""
        return {"kind": "together", "dense_layers": list(layers), **self._lost(layers)}

    def _lost(self, dense: tuple[int, ...]) -> Record:
        """Mean KL of the next token's distribution from that of a model that reads everything."""
        began = time.perf_counter()
        selector = named_selector(self._config.select, whole=0, dense_layers=dense)
        hidden, targets = self._hidden(selector), self._passage.targets
        found = compare(self.loaded.model, self._exact, hidden, targets)
        return {
            "divergence": float(np.mean(found.divergence)),
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _hidden(self, selector: ChunkSelector | None) -> np.ndarray:
        config = self._config
        scorer = SharedScorer(
            self.loaded.model,
            self._passage,
            dtype=config.dtype,
            chunk_size=config.chunk_size,
            selector=selector,
            prefill_tokens=config.prefill_tokens,
            implementation=config.implementation,
        )
        return scorer.hidden()

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        return self._hidden(None)

    @functools.cached_property
    def _passage(self) -> Passage:
        config, most = self._config, self.loaded.config.max_positions
        needed = passage_tokens(config.prefix, config.window, config.windows)
        tokens = tokens_of(self.loaded, self._text[: _CHARACTERS * needed])
        if needed > len(tokens):
            raise UserError(
                f"the text has {len(tokens):,} tokens of {config.model}; --prefix, --window and "
                f"--windows take {needed:,}: choose fewer, or a longer --text"
            )
        if config.prefix + config.window > most:
            raise UserError(
                f"--prefix with --window makes {config.prefix + config.window:,} positions, "
                f"{config.model} has {most:,}"
            )
        return Passage.of(tokens, config.prefix, config.window, config.windows)
