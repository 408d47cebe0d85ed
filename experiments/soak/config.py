"""The options of `soak`, and what their defaults come to for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.cluster_option import ClustersFile, check_clusters
from experiments.codecs import CodecName, check_used_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    MaxPositions,
    ModelName,
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads
from experiments.loading import ModelSource
from experiments.select_option import DenseLayers, KeepShare, SelectPolicy, check_selection
from experiments.tier_option import Disk, DiskMemory, HostMemory, check_tiers

LEAST_CONTEXT = 64


@dataclass(frozen=True)
class SoakConfig:
    """Run random requests for a long time and prove that nothing leaks, is lost or is compiled
    again."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "minutes": 0.05,
        "interval": 0.2,
        "recheck": 4,
        "rows": 2,
        "new_weights": 3,
    }

    minutes: float = 5.0
    """How long requests come. The first fifth warms up: it counts for nothing but lost requests."""

    model: ModelName = "random:tiny"

    rows: int = 16
    """Most requests decoded at once."""

    chunk_size: int = 16
    """Tokens in a chunk of the KV cache."""

    codec: CodecName = "identity"

    heads: HeadsFolder = None

    head_share: HeadShare = None

    select: SelectPolicy = None

    keep: KeepShare = None

    dense_layers: DenseLayers = None

    clusters: ClustersFile = None

    host_memory: HostMemory = None

    disk: Disk = None

    disk_memory: DiskMemory = "20GiB"
    """What files in the folder of `--disk` may take."""

    chunks: Annotated[int | None, by_default("INT", "a fifth of what full rows need")] = None
    """Chunks in the pool. Few make evictions and preemptions frequent."""

    context_tokens: Annotated[int | None, by_default("INT", "512, or what the model has")] = None
    """Longest prompt and answer together."""

    max_positions: MaxPositions = None

    steps_per_call: int = 4
    """Tokens decoded for each row in one call to the device."""

    prefill_tokens: int = 128
    """Most prompt tokens computed between two decode calls: 32, 128 or 512."""

    interval: float = 1.0
    """Seconds between two lines of `results.jsonl`, and two checks of the engine's invariants."""

    new_weights: int = 20
    """Times that the model's weights are replaced by new ones, which are of the same values."""

    recheck: int = 32
    """Greedy requests, chosen at random, that are computed again at the end."""

    seed: int = 0
    """Seed of the work, and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/soak-TIME")] = None
    """Folder for the results."""


def check(config: SoakConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_above_zero(config, "minutes", "interval")
    check_at_least_one(
        config, "rows", "chunk_size", "chunks", "steps_per_call", "recheck", "max_positions"
    )
    if config.prefill_tokens not in (32, 128, 512):
        raise UserError(f"--prefill-tokens must be 32, 128 or 512, got {config.prefill_tokens}")
    if config.context_tokens is not None and config.context_tokens < LEAST_CONTEXT:
        raise UserError(
            f"--context-tokens must be at least {LEAST_CONTEXT}, got {config.context_tokens}"
        )
    if config.new_weights < 0:
        raise UserError(f"--new-weights must be 0 or more, got {config.new_weights}")
    check_used_codec(config.codec)
    check_heads(config)
    check_selection(config, config.chunk_size)
    check_clusters(config.clusters)
    check_tiers(config)
    check_seed(config.seed)


@dataclass(frozen=True)
class Sizes:
    """What the config's defaults come to for a model."""

    context_tokens: int
    num_chunks: int


def sizes_for(config: SoakConfig, source: ModelSource, max_positions: int) -> Sizes:
    """The longest context and the pool. Raises `UserError` when one does not fit the other."""
    if max_positions < LEAST_CONTEXT:
        raise UserError(
            f"{source.name} with {max_positions} positions is too small for a soak, which needs "
            f"{LEAST_CONTEXT}; choose more by --max-positions, or another model"
        )
    context = config.context_tokens or min(512, max_positions)
    if context > max_positions:
        raise UserError(
            f"--context-tokens {context} is above the {max_positions} positions of {source.name}"
        )
    longest = -(-context // config.chunk_size)
    # Beside the longest request there is room for prefixes of half its length to be pinned.
    least = longest + -(-longest // 2)
    chunks = config.chunks or max(least, config.rows * longest // 5)
    if chunks < least:
        raise UserError(
            f"--chunks {chunks} is too small for contexts of {context} tokens: it must be at "
            f"least {least}"
        )
    return Sizes(context, chunks)
