"""The options of `serve`."""

from __future__ import annotations

import dataclasses
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
    check_above_zero,
    check_at_least_one,
    check_seed,
    option,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads
from experiments.mesh_option import MeshShape, mesh_devices
from experiments.select_option import DenseLayers, KeepShare, SelectPolicy, check_selection
from experiments.trace import BLOCK_TOKENS

Side = Literal["shared", "free-at-once", "unshared"]


@dataclass(frozen=True)
class ServeConfig:
    """Serve requests as they arrive, and compare serving with and without shared prefixes."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "requests": 8,
        "scale": 128,
        "warm_up": 0.0,
    }

    model: ModelName = "random:tiny"

    trace: Annotated[Path | None, by_default("FILE", "made-up requests")] = None
    """A request trace in the format of Mooncake's releases: JSON lines of `timestamp`,
    `input_length`, `output_length` and `hash_ids`."""

    requests: int = 200
    """How many requests to serve."""

    every: int = 20
    """Keep one in so many of the trace's conversations, whole, so that few requests find their
    earlier turns as often as all of them would; 1 keeps all."""

    scale: int = 32
    """Divides all lengths: those of the trace, or the three that follow. A divisor of 512."""

    shared_tokens: int = 2048
    """Without a trace: tokens of a system prompt, before scaling."""

    own_tokens: int = 64
    """Without a trace: tokens of a request's prompt behind the system prompt, before scaling."""

    completion_tokens: int = 512
    """Without a trace: tokens of each answer, before scaling."""

    system_prompts: int = 1
    """Without a trace: how many system prompts there are; requests take turns."""

    closed: Annotated[int | None, by_default("INT", "max-running, unless in time")] = None
    """Requests under way at once: the next comes when one is done."""

    speed: Annotated[float | None, by_default("FLOAT", "not in time")] = None
    """Seconds of the trace that pass in a second: requests come in time."""

    rate: Annotated[float | None, by_default("FLOAT", "not in time")] = None
    """Without a trace: requests a second, with random gaps."""

    sides: tuple[Side, ...] = ("shared", "free-at-once", "unshared")
    """Ways to serve them, one after another, the same requests each."""

    rounds: int = 1
    """How often to do all this, for a median; three or more where the machine does other things."""

    max_running: int = 32
    """The most requests decoded at once; others wait."""

    pool_chunks: Annotated[int | None, by_default("INT", "by memory")] = None
    """Size of the KV pool, in chunks."""

    pool_memory: Annotated[
        str | None, by_default("SIZE", "room for all requests, 1GiB at most")
    ] = None
    """Size of the KV pool, such as 500MB or 2GiB."""

    chunk_size: Annotated[int | None, by_default("INT", "a scaled block, 64 at most")] = None
    """Tokens in a chunk of the KV cache."""

    codec: CodecName = "identity"

    heads: HeadsFolder = None

    head_share: HeadShare = None

    select: SelectPolicy = None

    keep: KeepShare = None

    dense_layers: DenseLayers = None

    clusters: ClustersFile = None

    steps_per_call: int = 8
    """Tokens decoded for each request in one call to the device."""

    prefill_tokens: Literal[32, 128, 512] = 512
    """The most prompt tokens computed between two decode calls."""

    warm_up: float = 10.0
    """The most seconds, compiling not counted, that each side first serves the same requests
    without being measured, so that little is left to compile; 0 is off."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    implementation: AttentionImplementation = None

    mesh: MeshShape = None

    seed: int = 0
    """Seed of prompts, of random gaps and of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/serve-TIME")] = None
    """Folder for the results."""

    @property
    def block_tokens(self) -> int:
        """Tokens that a block of the trace becomes."""
        return BLOCK_TOKENS // self.scale

    @property
    def tokens_per_chunk(self) -> int:
        """`chunk_size`, or its default."""
        return min(64, self.block_tokens) if self.chunk_size is None else self.chunk_size

    @property
    def at_once(self) -> int | None:
        """Requests under way at once in a closed loop; None when they come in time."""
        if self.speed is not None or self.rate is not None:
            return None
        return self.max_running if self.closed is None else self.closed


_COUNTS = (
    "requests",
    "every",
    "scale",
    "shared_tokens",
    "own_tokens",
    "completion_tokens",
    "system_prompts",
    "closed",
    "rounds",
    "max_running",
    "pool_chunks",
    "chunk_size",
    "steps_per_call",
)
_WITHOUT_TRACE = ("rate", "shared_tokens", "own_tokens", "completion_tokens", "system_prompts")
_WITH_TRACE = ("speed", "every")


def check(config: ServeConfig) -> None:
    """Raise `UserError` for a value that no run could use, or options that exclude each other."""
    check_at_least_one(config, *_COUNTS)
    if BLOCK_TOKENS % config.scale:
        raise UserError(
            f"--scale must divide {BLOCK_TOKENS} (1, 2, 4 and so on), got {config.scale}"
        )
    check_above_zero(config, "speed", "rate")
    if config.max_positions is not None and config.max_positions < 2:
        raise UserError(
            "--max-positions must be at least 2, for a prompt and an answer, "
            f"got {config.max_positions}"
        )
    if not config.warm_up >= 0:
        raise UserError(f"--warm-up must be a number of seconds from 0 up, got {config.warm_up}")
    if not config.sides or len(set(config.sides)) < len(config.sides):
        raise UserError(
            f"--sides must name each side once, got: {' '.join(config.sides) or 'none'}"
        )
    check_used_codec(config.codec)
    check_heads(config)
    mesh_devices(config.mesh)
    check_selection(config, config.tokens_per_chunk)
    check_clusters(config.clusters)
    check_seed(config.seed)
    _check_together(config)


def _check_together(config: ServeConfig) -> None:
    if config.closed is not None and config.at_once is None:
        timed = "speed" if config.speed is not None else "rate"
        raise UserError(f"--closed and {option(timed)} exclude each other: in turns, or in time")
    if config.pool_chunks is not None and config.pool_memory is not None:
        raise UserError("--pool-chunks and --pool-memory exclude each other")
    useless = _WITH_TRACE if config.trace is None else _WITHOUT_TRACE
    for name in useless:
        if getattr(config, name) != _DEFAULTS[name]:
            only = "only for a --trace" if config.trace is None else "not for a --trace"
            instead = {"speed": "; --rate", "rate": "; --speed"}.get(name)
            hint = f"{instead} sets how fast requests come" if instead else ""
            raise UserError(f"{option(name)} is {only}{hint}")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServeConfig)}
