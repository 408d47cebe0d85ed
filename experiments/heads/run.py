"""The work of `heads`: patterns found, then each share of each of them measured."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.state_files import StateFiles
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.heads.config import HeadsConfig
from experiments.heads.measures import head_measures
from experiments.heads.table import Table
from experiments.heads.training_texts import copied_text
from experiments.loading import ModelSource
from experiments.over_text import OverText
from experiments.prompts import given_text, second_half, text_name, tokens_of
from experiments.quality.codecs import copy_passage, string_begins
from experiments.quality.config import SHOWN, STRING
from models import HeadPatternError
from models.head_patterns import GateTraining, HeadPattern, copy_scores, write_pattern

_SETTING = (
    "model",
    "sinks",
    "recent",
    "prefix",
    "window",
    "windows",
    "copy_lengths",
    "copy_strings",
    "chunk_size",
    "dtype",
    "seed",
)


@compilation_cache()
def measure(config: HeadsConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = given_text(config.text)
    folder.begin(environment)
    finding = _Finding(config, source, text, folder)
    measure_units(folder, dict(finding.units()), "find")
    table = Table(config, finding.loaded, text)
    cells: dict[str, Callable[[], Record]] = {}
    if config.shares:
        cells["all heads"] = functools.partial(table.measure, "all heads", None, 1)
        for name in finding.names:
            for share in config.shares:
                pattern = functools.partial(finding.pattern, name)
                cell = functools.partial(table.measure, name, pattern, share)
                cells[f"{name}, {100 * share:g}%"] = cell
    records = measure_units(folder, cells, "measure")
    finding.forget_state()
    summary = {
        "experiment": "heads",
        **{name: getattr(config, name) for name in _SETTING},
        "patterns": finding.names,
        "text": text_name(config.text),
        "scored_tokens": config.window * config.windows,
        "measured": [dataclasses.asdict(one) for one in head_measures(records)],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Finding(OverText[HeadsConfig]):
    """Finds the patterns, each into a folder of its own."""

    def __init__(
        self, config: HeadsConfig, source: ModelSource, text: str, folder: ResultFolder
    ) -> None:
        super().__init__(config, source, text, folder)
        self._states = StateFiles(folder.path, "gates")
        self._training: GateTraining | None = None

    @property
    def names(self) -> list[str]:
        """Of all patterns."""
        return [name for chooser in self._config.patterns for name in self._names_of(chooser)]

    def units(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        """What finds them, one after another."""
        config = self._config
        for chooser in config.patterns:
            if chooser == "learned":
                begins = range(0, config.steps, config.save_every)
                for begin, end in zip(begins, [*begins[1:], config.steps], strict=True):
                    yield f"gates, step {end}", functools.partial(self._learn, begin, end)
            for name in self._names_of(chooser):
                yield name, functools.partial(self._find, name)

    def pattern(self, name: str) -> HeadPattern:
        """One that is found, as its record has it."""
        scores = self._folder.finished[name]["scores"]
        return HeadPattern.of(scores, self._config.sinks, self._config.recent)

    def forget_state(self) -> None:
        """Delete what only going on needs."""
        self._states.keep()

    def _names_of(self, chooser: str) -> list[str]:
        if chooser != "random":
            return [chooser]
        return [f"random-{number}" for number in range(1, self._config.random_patterns + 1)]

    def _find(self, name: str) -> Record:
        began = time.perf_counter()
        if name == "scored":
            scores = self._copy_scores()
        elif name == "learned":
            scores = np.array(self._training_after(self._config.steps).pattern.scores)
        else:
            spec = self.loaded.model.cache_spec
            random = np.random.default_rng((self._config.seed, int(name.removeprefix("random-"))))
            scores = random.random((spec.num_layers, spec.num_kv_heads))
        pattern = HeadPattern.of(scores, self._config.sinks, self._config.recent)
        about = {"made_by": "jax_chunkattn", "pattern": name, "model_name": self._config.model}
        write_pattern(self._folder.path / name, pattern, self.loaded.model, about)
        return {
            "kind": "pattern",
            "pattern": name,
            "scores": [list(layer) for layer in pattern.scores],
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _copy_scores(self) -> np.ndarray:
        config = self._config
        self._check_positions("--length", config.length + STRING)
        passage = copy_passage(
            self._tokens, length=config.length, strings=config.strings, seed=config.seed
        )
        strings = np.concatenate([passage.inputs, passage.targets[:, -1:]], axis=1)
        begins = np.array(string_begins(config.length, config.strings))
        return copy_scores(self.loaded.model, passage.prefix, strings, begins, shown=SHOWN)

    def _learn(self, begin: int, end: int) -> Record:
        """Steps of the optimiser from `begin` to `end`."""
        began = time.perf_counter()
        config = self._config
        self._check_positions("--learn-length", config.learn_length)
        training = self._training_after(begin)
        losses = []
        for step in range(begin, end):
            tokens, labels = copied_text(
                self._tokens,
                length=config.learn_length,
                strings=config.learn_strings,
                random=np.random.default_rng((config.seed, step)),
            )
            losses.append(training.step(tokens, labels))
        training.save(self._states.path(end))
        self._states.keep(begin, end)  # that of `begin` is needed until this record is written
        distances, mean_gates = zip(*losses, strict=True)
        return {
            "kind": "gates",
            "step": end,
            "distance": float(np.mean(distances)),
            "mean_gate": mean_gates[-1],
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _training_after(self, step: int) -> GateTraining:
        """The training as it was after so many steps: as it is here, or as it was saved."""
        if self._training is None:
            config = self._config
            self._training = GateTraining(
                self.loaded.model,
                steps=config.steps,
                sinks=config.sinks,
                recent=config.recent,
                rate=config.rate,
                penalty=config.penalty,
            )
            if step:
                self._states.restore(step, self._training.restore, unreadable=HeadPatternError)
        return self._training

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        tokens = tokens_of(self.loaded, second_half(self._text))
        needed = max(self._config.length, self._config.learn_length)
        if len(tokens) < needed:
            raise UserError(
                f"the second half of the text has {len(tokens):,} tokens of {self._config.model}, "
                f"--length and --learn-length take {needed:,}: choose fewer, or a longer --text"
            )
        return np.asarray(tokens, np.int32)

    def _check_positions(self, option: str, needed: int) -> None:
        most = self.loaded.config.max_positions
        if needed > most:
            raise UserError(
                f"{option} makes {needed:,} positions, {self._config.model} has {most:,}"
            )
