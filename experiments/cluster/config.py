"""The options of `cluster`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import (
    ModelName,
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
    option,
)

PolicyName = Literal["random", "least-loaded", "prefix-hash", "longest-match", "least-work"]
REQUESTS = 4_000
"""How many are made up, unless the user says."""

MOST_REPLICAS = 1_000
_SCALES = tuple(2**power for power in range(10))  # the divisors of a block of 512
_MADE_UP = (
    "tenants",
    "zipf",
    "turns",
    "pause",
    "system_tokens",
    "question_tokens",
    "answer_tokens",
)


@dataclass(frozen=True)
class ClusterConfig:
    """Route requests to many replicas by several policies: hit rate, imbalance, time to the first
    token. Trees and router are real; devices are a model fitted to this machine."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "requests": 60,
        "replicas": (2, 3),
        "pool_tokens": 40_000,
        "prefill_points": (64, 256),
        "decode_points": (1, 2, 4),
        "contexts": (64, 128),
    }

    trace: Annotated[Path | None, by_default("FILE", "conversations that are made up")] = None
    """A request trace in the format of Mooncake's releases: JSON lines with `timestamp`,
    `input_length`, `output_length` and `hash_ids`, which name the prompt's blocks of 512 tokens;
    equal ids are equal prefixes."""

    replicas: tuple[int, ...] = (8, 32)
    """Sizes of the fleet."""

    policies: Annotated[
        tuple[PolicyName, ...], tyro.conf.arg(help_behavior_hint="(default: all)")
    ] = get_args(PolicyName)
    """How a replica is chosen; see `jax_chunkattn.replicas.policies`."""

    load: float = 0.5
    """How fast requests come: as a share of what the fleet could do if nothing were found in any
    cache. Times of arrival are stretched to that, whatever the trace says."""

    pool_tokens: int = 500_000
    """Tokens that the pool of each replica holds."""

    chunk_size: int = 64
    """Tokens in a chunk."""

    max_running: int = 32
    """Requests that a replica decodes at once."""

    overload_factor: float = 1.5
    """A replica with more work than so many times the mean, and --overload-slack beside, is
    overloaded."""

    overload_slack: float = 2048.0
    """In tokens of prompts that wait to be computed."""

    model: ModelName = "random:small"

    prefill_points: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8192)
    """Lengths of the prompts that the device model is fitted to."""

    decode_points: tuple[int, ...] = (1, 8, 32)
    """Numbers of rows that it is fitted to, each with every one of --contexts, shared and not."""

    contexts: tuple[int, ...] = (128, 1024)
    """Tokens before the rows that decode."""

    device: Annotated[Path | None, by_default("FILE", "measured first")] = None
    """The `summary.json` of an earlier run, for its device model: nothing is measured then."""

    scale: int = 1
    """With --trace: one token stands for so many of the trace's, a divisor of 512. A small device
    can then serve what was recorded of large ones."""

    requests: Annotated[int | None, by_default("INT", f"{REQUESTS:,}, or the whole trace")] = None
    """Requests to route: so many turns of conversations are made up, or the first ones of the
    trace."""

    tenants: int = 200
    """Made-up tenants, each with a system prompt of its own."""

    zipf: float = 1.0
    """How unequal tenants are: the k-th has a share of conversations proportional to 1 / k^zipf."""

    turns: float = 4.0
    """Mean number of turns of a conversation."""

    pause: float = 0.05
    """Mean time between two turns of a conversation, as a share of the whole replay."""

    system_tokens: int = 1_500
    """Mean length of a system prompt."""

    question_tokens: int = 500
    """Mean length of a question."""

    answer_tokens: int = 200
    """Mean length of an answer, which is part of the next turn's prompt."""

    seed: int = 0
    """Seed of what is made up, and of what policies leave to chance."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/cluster-TIME")] = None
    """Folder for the results."""


def check_policies(policies: Sequence[str]) -> None:
    """Raise `UserError` for a name that is none of a router's policies."""
    for policy in policies:
        if policy not in get_args(PolicyName):
            known = ", ".join(get_args(PolicyName))
            raise UserError(f"--policies: unknown {policy!r}; known: {known}")


def check(config: ClusterConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    for name in ("replicas", "policies", "prefill_points", "decode_points", "contexts"):
        values = getattr(config, name)
        if not values:
            raise UserError(f"{option(name)} names nothing")
        if len(set(values)) < len(values):
            raise UserError(f"{option(name)} names one twice: {' '.join(map(str, values))}")
    check_policies(config.policies)
    check_at_least_one(
        config, "replicas", "pool_tokens", "chunk_size", "max_running", "requests", "tenants",
        "turns", "system_tokens", "question_tokens", "answer_tokens", "prefill_points",
        "decode_points", "contexts", "overload_factor",
    )  # fmt: skip
    check_above_zero(config, "load", "turns", "pause")
    if max(config.replicas) > MOST_REPLICAS:
        raise UserError(f"--replicas must be at most {MOST_REPLICAS:,}, got {max(config.replicas)}")
    if config.overload_slack < 0:
        raise UserError(f"--overload-slack must be at least 0, got {config.overload_slack}")
    if not 0 <= config.zipf < 100:
        raise UserError(f"--zipf must be from 0 (all alike) to 100, got {config.zipf}")
    if config.pool_tokens < config.chunk_size:
        raise UserError(
            f"--pool-tokens {config.pool_tokens} is less than a chunk of {config.chunk_size}"
        )
    check_seed(config.seed)
    if config.scale not in _SCALES:
        raise UserError(f"--scale must be a power of two up to 512, got {config.scale}")
    if config.trace is None and config.scale != 1:
        raise UserError("--scale is for a --trace: what is made up has lengths of its own")
    if config.trace is not None:
        for field in fields(config):
            if field.name in _MADE_UP and getattr(config, field.name) != field.default:
                raise UserError(
                    f"{option(field.name)} is not for a --trace: it is of what is made up"
                )
