"""The option `--clusters`: heads of which one attends for all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from models import Decoder
    from pallas_kernels.clusters import HeadClusters

ClustersFile = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="FILE",
        help="How many clusters the heads of each layer form, of which one head attends for all: a "
        "file that `clusters` has written for the model. Pays for models with many KV heads.",
        help_behavior_hint="(default: each head attends for itself)",
    ),
]
"""The option of what runs an engine; see `pallas_kernels.clusters`."""


def check_clusters(file: Path | None) -> None:
    """Raise `LayerFileError` for a file that no model could use."""
    if file is None:
        return
    from models.head_clusters import CLUSTERS  # and JAX, which --help can do without

    CLUSTERS.read(file)


def chosen_clusters(file: Path | None, model: Decoder) -> HeadClusters | None:
    """What `CacheConfig` takes for it.

    Raises:
        LayerFileError: the file is for another model.
    """
    if file is None:
        return None
    from models.head_clusters import load_clusters

    return load_clusters(file, model)
