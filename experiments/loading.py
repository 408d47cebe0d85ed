"""Which model a run uses, and having it on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError

SMOLLM2 = "smollm2"
RANDOM_PREFIX = "random:"


@dataclass(frozen=True)
class ModelSource:
    """A model named on the command line: `smollm2`, `random:PRESET`, or else a file's path."""

    name: str

    @property
    def is_random(self) -> bool:
        return self.name.startswith(RANDOM_PREFIX)


def parse_model(name: str) -> ModelSource:
    """The model that `--model name` means; the preset of a random one is checked when it is made.

    Raises:
        UserError: `name` is neither a known name nor an existing file.
    """
    if name == SMOLLM2 or name.startswith(RANDOM_PREFIX):
        return ModelSource(name)
    if not Path(name).is_file():
        what = "there is no such file" if name.endswith(".gguf") else "unknown model"
        raise UserError(
            f"--model {name}: {what}; expected {SMOLLM2}, the path of a GGUF file, or "
            f"{RANDOM_PREFIX}PRESET (such as {RANDOM_PREFIX}tiny)"
        )
    return ModelSource(name)


def fetch_model(source: ModelSource) -> str | Path:
    """What `models.load` takes for `source`; a model not yet on this machine is downloaded.

    Raises:
        UserError: an unknown preset.
        models.DownloadError: the model cannot be fetched.
    """
    import models

    if source.name == SMOLLM2:
        return models.fetch_smollm2()
    if source.is_random:
        try:
            models.preset(source.name.removeprefix(RANDOM_PREFIX))
        except ValueError as error:
            raise UserError(f"--model {source.name}: {error}") from error
    return source.name
