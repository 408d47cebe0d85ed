"""What commands share that measure one model over one text, into a folder of results."""

from __future__ import annotations

import functools
from typing import Generic, Protocol, TypeVar

from experiments.harness.inputs import check_unchanged
from experiments.harness.results import ResultFolder
from experiments.loading import LoadOptions, ModelSource, load_model
from models import LoadedModel


class WithModel(Protocol):
    """Options that say how a model is loaded."""

    @property
    def dtype(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def max_positions(self) -> int | None: ...


Config = TypeVar("Config", bound=WithModel)


class OverText(Generic[Config]):
    """The work of such a command; its model is loaded when it is first needed."""

    def __init__(
        self, config: Config, source: ModelSource, text: str, folder: ResultFolder
    ) -> None:
        self._config = config
        self._source = source
        self._text = text
        self._folder = folder

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The model, which is that of the run's beginning."""
        config = self._config
        options = LoadOptions(config.dtype, config.seed, config.max_positions)
        loaded = load_model(self._source, options)
        check_unchanged(self._folder.inputs, config)
        return loaded
