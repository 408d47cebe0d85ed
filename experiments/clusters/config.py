"""The options of `clusters`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)

Membership = Literal["medoid", "lowest", "random"]


@dataclass(frozen=True)
class ClustersConfig:
    """Find how many heads of each layer attend alike, write files that `--clusters` takes, and show
    what the model loses when one head of each cluster attends for all."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "pieces": 2,
        "shares": (0.5,),
        "memberships": ("medoid",),
        "passages": 1,
        "prefix": 16,
        "window": 20,
        "windows": 2,
        "chunk_size": 16,
        "repeats": 1,
    }

    model: ModelName = "smollm2"

    text: Annotated[Path | None, by_default("FILE", "Python's own help")] = None
    """UTF-8 text; clusters are found in its second half, and measured in its first."""

    pieces: int = 64
    """Pieces of the text that clusters are found with, each of a chunk's tokens and read by
    itself."""

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Clusters of all layers, as shares of all heads, beside those of the elbow."""

    memberships: tuple[Membership, ...] = ("medoid", "lowest", "random")
    """Who attends for a cluster: the head that is nearest to the others, or the first one; and
    clusters by chance."""

    random_draws: int = 3
    """How many clusters are drawn by chance."""

    passages: int = 4
    """Pieces of text that are scored, each with clusters of its own beginning."""

    prefix: int = 256
    """Tokens that all windows of a passage have before them; whole chunks."""

    window: int = 128
    """Tokens of a window of text; all are scored."""

    windows: int = 8
    """Windows of a passage, one after another in the text."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    repeats: int = 3
    """Times decoding is timed, in turns with that of all heads."""

    implementation: AttentionImplementation = None

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of k-means, of clusters by chance, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/clusters-TIME")] = None
    """Folder for the results, and for the files: `elbow.json`, `50.json` and so on."""


def check(config: ClustersConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    counts = "pieces", "random_draws", "passages", "prefix", "window", "windows", "chunk_size"
    check_at_least_one(config, *counts, "repeats", "max_positions")
    shares = config.shares
    if len(set(shares)) < len(shares) or not all(0 < share < 1 for share in shares):
        raise UserError(
            "--shares must be above 0 and below 1, each once; all heads are measured anyway; got "
            f"{' '.join(map(str, shares))}"
        )
    memberships = config.memberships
    if not memberships or len(set(memberships)) < len(memberships):
        given = " ".join(memberships) or "none"
        raise UserError(f"--memberships must name one or more, each once, got {given}")
    if config.prefix % config.chunk_size:
        raise UserError(
            f"--prefix must be a multiple of --chunk-size {config.chunk_size}, got {config.prefix}"
        )
    check_seed(config.seed)
