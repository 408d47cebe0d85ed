"""The options of `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.cluster_option import ClustersFile, check_clusters
from experiments.codecs import CodecName, check_used_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads
from experiments.mesh_option import MeshShape, mesh_devices
from experiments.prefix_option import PrefixFolder, check_prefix
from experiments.sampling import MOST_TEMPERATURE, MOST_TOP_K
from experiments.select_option import DenseLayers, KeepShare, SelectPolicy, check_selection


@dataclass(frozen=True)
class GenerateConfig:
    """Answer many questions behind one shared system prompt, and show what sharing saves."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "batch": 4,
        "max_tokens": 8,
        "compare_batch": 2,
    }

    model: ModelName = "smollm2"

    system_prompt: Annotated[Path | None, by_default("FILE", "the shipped one")] = None
    """A text file with the system prompt that all requests share."""

    prefix: PrefixFolder = None

    prompts: Annotated[Path | None, by_default("FILE", "the 32 shipped ones")] = None
    """Questions, one a line, or JSON lines of `text` (a question) or `tokens` (a whole prompt)."""

    batch: Annotated[int | None, by_default("INT", "all")] = None
    """How many of the prompts to answer, from the first on."""

    max_tokens: int = 48
    """The most tokens of an answer."""

    ignore_eos: bool = False
    """Go on to max-tokens even when an answer has ended; for measuring speed."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache; prefixes are shared in whole chunks."""

    codec: CodecName = "identity"

    heads: HeadsFolder = None

    head_share: HeadShare = None

    select: SelectPolicy = None

    keep: KeepShare = None

    dense_layers: DenseLayers = None

    clusters: ClustersFile = None

    temperature: float = 0.0
    """Randomness of sampling; 0 takes the likeliest token."""

    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 is off."""

    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 is off."""

    seed: int = 0
    """Seed of sampling (request i uses seed + i) and of random weights and prompts."""

    implementation: AttentionImplementation = None

    mesh: MeshShape = None

    deterministic: bool = False
    """Compute each token to the same bits whatever else is computed with it, and whatever is
    cached; on CPUs."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    sharing: bool = True
    """Store and read the KV cache of a shared prefix once."""

    steps_per_call: int = 8
    """Tokens decoded for each request in one call to the device."""

    compare: bool = True
    """Afterwards do the same without sharing."""

    compare_batch: Annotated[int | None, by_default("INT", "what half a minute allows")] = None
    """The most requests to answer without sharing; never more than `batch`."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/generate-TIME")] = None
    """Folder for the results."""


def check(config: GenerateConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(
        config,
        "batch",
        "max_tokens",
        "chunk_size",
        "steps_per_call",
        "compare_batch",
        "max_positions",
    )
    if not 0 <= config.temperature <= MOST_TEMPERATURE:
        raise UserError(
            f"--temperature must be a number from 0 to {MOST_TEMPERATURE}, got {config.temperature}"
        )
    if not 0 <= config.top_k <= MOST_TOP_K:
        raise UserError(f"--top-k must be from 0 (off) to {MOST_TOP_K}, got {config.top_k}")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {config.top_p}")
    check_seed(config.seed)
    check_prefix(config.prefix, config.system_prompt)
    check_used_codec(config.codec)
    check_heads(config)
    mesh_devices(config.mesh)
    check_selection(config, config.chunk_size)
    check_clusters(config.clusters)
