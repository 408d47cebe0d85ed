"""The work of `clusters`: counts found, then each of them measured with each membership."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.clusters.config import ClustersConfig
from experiments.clusters.measures import cluster_measures
from experiments.harness import timing
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import ModelSource
from experiments.over_text import OverText
from experiments.prompts import given_text, second_half, text_name, tokens_of
from experiments.quality.codecs import compare
from experiments.quality.run_codecs import agreement_lists
from experiments.quality.scoring import Passage, Scores, SharedScorer, passage_tokens
from models.head_clusters import (
    CLUSTERS,
    clustering_errors,
    counts_within,
    elbows,
    head_correlations,
)
from pallas_kernels.clusters import HeadClusters, KeySlots

ELBOW = "elbow"
_SETTING = (
    "model",
    "pieces",
    "passages",
    "prefix",
    "window",
    "windows",
    "chunk_size",
    "repeats",
    "random_draws",
    "dtype",
    "seed",
)


@compilation_cache()
def measure(config: ClustersConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = given_text(config.text)
    folder.begin(environment)
    work = _Clustering(config, source, text, folder)
    measure_units(folder, {"counts": work.find}, "find")
    cells: dict[str, Callable[[], Record]] = {
        "all heads": functools.partial(work.measure, "all heads", None)
    }
    for counted in work.counts:
        for membership in config.memberships:
            for draw in range(config.random_draws if membership == "random" else 1):
                name = f"{counted}, {membership}" + (f" {draw + 1}" if draw else "")
                cells[name] = functools.partial(work.measure, counted, membership, draw)
    records = measure_units(folder, cells, "measure")
    summary = {
        "experiment": "clusters",
        **{name: getattr(config, name) for name in _SETTING},
        "text": text_name(config.text),
        "scored_tokens": config.window * config.windows * config.passages,
        "counts": work.counts,
        "measured": [dataclasses.asdict(one) for one in cluster_measures(records)],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Clustering(OverText[ClustersConfig]):
    """Finds counts, and measures a model whose heads form so many clusters."""

    @property
    def counts(self) -> dict[str, list[int]]:
        """Clusters of each layer, as their record has them."""
        return self._folder.finished["counts"]["counts"]

    def find(self) -> Record:
        """The counts of the elbow, and of each share; each is written into a file of its own."""
        began = time.perf_counter()
        config = self._config
        tokens = tokens_of(self.loaded, second_half(self._text))
        whole = len(tokens) // config.chunk_size
        if whole < config.pieces:
            raise UserError(
                f"the second half of the text has {whole} pieces of {config.chunk_size} tokens, "
                f"--pieces takes {config.pieces}: choose fewer, or a longer --text"
            )
        pieces = np.array(tokens[: whole * config.chunk_size], np.int32)
        pieces = pieces.reshape(whole, -1)[np.linspace(0, whole - 1, config.pieces).astype(int)]
        errors = clustering_errors(head_correlations(self.loaded.model, pieces), config.seed)
        counts = {ELBOW: elbows(errors)}
        counts |= {f"{100 * share:g}%": counts_within(errors, share) for share in config.shares}
        for counted, of_layers in counts.items():
            about = {"made_by": "jax_chunkattn", "model_name": config.model, "counted": counted}
            path = self._folder.path / f"{counted.rstrip('%')}.json"
            CLUSTERS.write(path, of_layers, self.loaded.model, about)
        return {
            "kind": "counts",
            "counts": {name: list(found) for name, found in counts.items()},
            "errors": [[float(f"{one:.4g}") for one in layer] for layer in errors.tolist()],
            "seconds": round(time.perf_counter() - began, 3),
        }

    def measure(self, counted: str, membership: str | None, draw: int = 0) -> Record:
        """The record of clusters, of chance in this draw; without a membership of the model as it
        is."""
        began = time.perf_counter()
        spec, size = self.loaded.model.cache_spec, jnp.dtype(self._config.dtype).itemsize
        counts, clusters = (spec.num_heads,) * spec.num_layers, None
        slots = spec.num_layers * spec.num_kv_heads
        if membership is not None:
            counts = tuple(self.counts[counted])
            clusters = HeadClusters(counts, membership, self._config.seed + draw)
            slots = KeySlots.of(clusters, spec.attention.heads).total
        scorer = self._scorer(self._passages[0], clusters)
        targets = np.concatenate([passage.targets for passage in self._passages])
        found = self._hidden(scorer, clusters)
        agreement = compare(self.loaded.model, self._exact, found, targets)
        return {
            "kind": "clusters",
            "counted": counted,
            "membership": membership,
            "draw": draw,
            "clusters": sum(counts),
            "key_bytes": slots * spec.head_dim * size,
            "kv_bytes": scorer.kv_bytes_per_token,
            "decode_time": self._decode_time(scorer),
            **agreement_lists(agreement),
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _decode_time(self, scorer: SharedScorer) -> float:
        """Of a step, over that of a step where each head attends for itself."""
        sides = {"all": self._all_heads, "some": scorer}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(self._decode, scorer) for name, scorer in sides.items()
        }
        timings, _ = timing.time_in_turns(calls, self._config.repeats, seed=self._config.seed)
        return timings["some"].median / timings["all"].median

    @staticmethod
    def _decode(scorer: SharedScorer) -> jax.Array:
        scores: Scores = scorer.decode()
        return jnp.asarray(scores.logprobs)

    def _hidden(self, first: SharedScorer, clusters: HeadClusters | None) -> np.ndarray:
        """Of all passages, the first of which has its scorer already."""
        others = (self._scorer(passage, clusters) for passage in self._passages[1:])
        return np.concatenate([first.hidden(), *(scorer.hidden() for scorer in others)])

    def _scorer(self, passage: Passage, clusters: HeadClusters | None) -> SharedScorer:
        config = self._config
        return SharedScorer(
            self.loaded.model,
            passage,
            dtype=config.dtype,
            chunk_size=config.chunk_size,
            clusters=clusters,
            implementation=config.implementation,
        )

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        return self._hidden(self._all_heads, None)

    @functools.cached_property
    def _all_heads(self) -> SharedScorer:
        return self._scorer(self._passages[0], None)

    @functools.cached_property
    def _passages(self) -> list[Passage]:
        """One after another in the text."""
        config = self._config
        shape = config.prefix, config.window, config.windows
        each, most = passage_tokens(*shape), self.loaded.config.max_positions
        tokens = tokens_of(self.loaded, self._text[: len(self._text) // 2])
        if each * config.passages > len(tokens):
            raise UserError(
                f"the first half of the text has {len(tokens):,} tokens of {config.model}; "
                f"--passages of --prefix and --windows of --window take "
                f"{each * config.passages:,}: choose fewer, or a longer --text"
            )
        if config.prefix + config.window > most:
            raise UserError(
                f"--prefix with --window makes {config.prefix + config.window:,} positions, "
                f"{config.model} has {most:,}"
            )
        return [
            Passage.of(tokens[begin : begin + each], *shape)
            for begin in range(0, each * config.passages, each)
        ]
