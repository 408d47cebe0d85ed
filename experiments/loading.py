"""Which model a run uses, and having it on this machine."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.harness.digests import digest
from experiments.harness.errors import UserError
from experiments.head_option import ChosenHeads

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from models import LoadedModel

SMOLLM2 = "smollm2"
RANDOM_PREFIX = "random:"
FILE_SUFFIXES = (".gguf", ".safetensors")
PATH_BEGINNINGS = (".", "/", "~")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model named on the command line: `smollm2`, `random:PRESET`, a path, or a hub name."""

    name: str

    @property
    def is_random(self) -> bool:
        return self.name.startswith(RANDOM_PREFIX)

    @property
    def path(self) -> Path | None:
        """The file or folder that is meant, when one is there."""
        expanded = os.path.expanduser(self.name)
        return Path(expanded) if os.path.exists(expanded) else None


def parse_model(name: str) -> ModelSource:
    """The model that `--model name` means.

    Anything that exists is a path. The preset of a random model, and whether the hub has a model,
    are found out by `fetch_model`.

    Raises:
        UserError: `name` is neither a known name, nor an existing file or folder, nor a hub name.
    """
    source = ModelSource(name)
    if name == SMOLLM2 or source.is_random or source.path is not None:
        return source
    looks_like_path = (
        name.startswith(PATH_BEGINNINGS)
        or name.endswith(FILE_SUFFIXES)
        or name.partition("@")[0].count("/") > 1
    )
    if looks_like_path or not HUB_NAME.fullmatch(name):
        what = "there is no such file or folder" if looks_like_path else "unknown model"
        raise UserError(
            f"--model {name}: {what}; expected {SMOLLM2}, the path of a GGUF file or of a folder "
            f"with config.json and *.safetensors, ORG/NAME on the Hugging Face hub, or "
            f"{RANDOM_PREFIX}PRESET (such as {RANDOM_PREFIX}tiny)"
        )
    return source


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: str = "float32"
    seed: int = 0
    max_positions: int | None = None
    heads: ChosenHeads | None = None
    mesh: Mesh | None = None


def load_model(source: ModelSource, options: LoadOptions = LoadOptions()) -> LoadedModel:
    """Fetch the model if it is not on this machine yet, and load it; progress goes to stderr.

    It has a `phase_display` of its own. Call it outside `deferred_interrupts`, so that Ctrl-C stops
    a download at once.

    Raises:
        UserError: an unknown preset, or a file that cannot be opened.
        models.DownloadError: the model cannot be fetched.
        models.CheckpointError: it cannot be used.
        models.HeadPatternError: `heads` are of another model.
        MeshError: `mesh` cannot split it.
    """
    return load_fetched(fetch_model(source), options)


def load_fetched(spec: str | Path, options: LoadOptions) -> LoadedModel:
    """The second half of `load_model`, of what `fetch_model` returned."""
    import models
    from experiments.harness.progress import phase_display

    with phase_display() as display:
        try:
            loaded = models.load(
                spec,
                dtype=options.dtype,
                seed=options.seed,
                max_positions=options.max_positions,
                mesh=options.mesh,
                on_progress=lambda done, total: display.update(
                    "load (MiB)", done >> 20, total >> 20
                ),
            )
        except OSError as error:
            raise UserError(f"--model {spec} cannot be read ({error.strerror or error})") from error
    if options.heads is None:
        return loaded
    return dataclasses.replace(loaded, model=options.heads.given_to(loaded.model))


def fetch_model(source: ModelSource) -> str | Path:
    """What `models.load` takes for `source`: a path, or `random:PRESET`.

    A model not yet on this machine is downloaded. Meanwhile, and while it is loaded, the attention
    is compiled for this machine's processor, if it was not yet. Raises as `load_model`.
    """
    import models
    from pallas_kernels.native import library
    from pallas_kernels.targets import current_target

    if current_target().platform == "cpu":
        library.prepare()
    if source.name == SMOLLM2:
        return fetched(source.name)
    if source.is_random:
        try:
            models.preset(source.name.removeprefix(RANDOM_PREFIX))
        except ValueError as error:
            raise UserError(f"--model {source.name}: {error}") from error
        return source.name
    if source.path is not None:
        return source.path
    return fetched(source.name)


@functools.cache
def fetched(name: str) -> Path:
    """Where `smollm2`, or a model of the hub, is; looked for once, so that all that one command
    does is done with one."""
    import models
    from models.hub import fetch_repository

    return models.fetch_smollm2() if name == SMOLLM2 else fetch_repository(name)


def model_inputs(name: str) -> dict[str, str]:
    """As `experiments.harness.inputs.inputs_of`, of the model that `--model name` means."""
    source = ModelSource(name)
    if source.is_random:
        return {}
    if name == SMOLLM2:
        from models.download import SMOLLM2 as PINNED

        return {name: PINNED.member_sha256}
    if source.path is not None:
        return _digests(source.path)
    return {name: fetched(name).name} if HUB_NAME.fullmatch(name) else {}


def _digests(path: Path) -> dict[str, str]:
    """Of all files that decide what is loaded; shows how far it is."""
    from experiments.harness.progress import phase_display
    from models.sources import checkpoint_files

    files = checkpoint_files(path)
    total, done = sum(file.stat().st_size for file in files), 0
    with phase_display() as display:

        def count(more: int) -> None:
            nonlocal done
            done += more
            display.update("digest (MiB)", done >> 20, total >> 20)

        return {str(file): digest(file, count) for file in files}
