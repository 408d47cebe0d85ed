"""The options of `cache`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from experiments.codecs import CODECS, check_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
    option,
)

PolicyName = Literal["lru", "free-at-once", "fifo", "lfu", "lfu-aged", "length-aware", "optimal"]
REQUESTS = 12_000
"""How many are made up, unless the user says."""

_MADE_UP = (
    "tenants", "zipf", "turns", "between", "system_tokens", "question_tokens", "answer_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class CacheConfig:
    """Replay requests into a prefix cache, without a model: hit rates by pool size, eviction policy
    and chunk size."""

    trace: Annotated[Path | None, by_default("FILE", "conversations that are made up")] = None
    """A request trace in the format of Mooncake's releases: JSON lines with `input_length` and
    `hash_ids`, which name the prompt's blocks of 512 tokens; equal ids are equal prefixes."""

    pool_tokens: tuple[int, ...] = (
        1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000, 50_000_000,
    )  # fmt: skip
    """Sizes of the pool, in tokens, besides one without bound."""

    policies: Annotated[
        tuple[PolicyName, ...], tyro.conf.arg(help_behavior_hint="(default: all)")
    ] = get_args(PolicyName)
    """Which cached chunks go first, always leaves of the tree. The engine has `lru`, and
    `free-at-once` of the paper, which caches nothing; the others are simulated."""

    chunk_sizes: tuple[int, ...] = (64, 256, 1024)
    """Tokens in a chunk; only whole chunks are shared."""

    in_use: tuple[int, ...] = (1, 8, 32, 128)
    """Requests in use at a time under `free-at-once`: each is released when that many others have
    come. The pool is as large as that takes."""

    bytes_per_token: Annotated[int | None, by_default("INT", "pools in tokens alone")] = None
    """Bytes of keys and values of one token, to show the pools in GiB as well;
    `python -m experiments models` tells them."""

    codec: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar=f"[{CODECS} ...]", help_behavior_hint="(optional)")
    ] = ()
    """What LRU finds with these codecs in the bytes that --pool-tokens take in float16."""

    head_dim: int = 128
    """With --codec: numbers of a head, which decide how many bytes a codec takes."""

    requests: Annotated[int | None, by_default("INT", f"{REQUESTS:,}, or the whole trace")] = None
    """Requests to replay: so many turns of conversations are made up, or the first ones of the
    trace."""

    tenants: int = 200
    """Made-up tenants, each with a system prompt of its own."""

    zipf: float = 1.0
    """How unequal tenants are: the k-th has a share of conversations proportional to 1 / k^zipf."""

    turns: float = 4.0
    """Mean number of turns of a conversation."""

    between: float = 1_000.0
    """Mean number of other requests between two turns of a conversation."""

    system_tokens: int = 1_500
    """Mean length of a system prompt."""

    question_tokens: int = 2_500
    """Mean length of a question, with what is pasted into it."""

    answer_tokens: int = 350
    """Mean length of an answer, which is part of the next turn's prompt."""

    seed: int = 0
    """Seed of what is made up."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/cache-TIME")] = None
    """Folder for the results: `results.jsonl` has a line for each policy and chunk size."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "requests": 400,
        "pool_tokens": (50_000, 200_000, 1_000_000),
        "chunk_sizes": (64, 1024),
    }


# More would count tokens beyond 64 bits, or hold too many prompts of a conversation.
_MOST = {
    "turns": 1_000,
    "system_tokens": 1_000_000,
    "question_tokens": 1_000_000,
    "answer_tokens": 1_000_000,
}


def check(config: CacheConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    for name in ("pool_tokens", "policies", "chunk_sizes", "in_use", "codec"):
        values = getattr(config, name)
        if not values and name != "codec":
            raise UserError(f"{option(name)} names nothing to replay with")
        if len(set(values)) < len(values):
            raise UserError(f"{option(name)} names one twice: {' '.join(map(str, values))}")
    for policy in config.policies:
        if policy not in get_args(PolicyName):
            known = ", ".join(get_args(PolicyName))
            raise UserError(f"--policies: unknown {policy!r}; known: {known}")
    check_at_least_one(
        config, "pool_tokens", "chunk_sizes", "in_use", "bytes_per_token", "requests", "tenants",
        "turns", "system_tokens", "question_tokens", "answer_tokens", "head_dim",
    )  # fmt: skip
    check_above_zero(config, "turns", "between")
    for name, most in _MOST.items():
        if getattr(config, name) > most:
            raise UserError(f"{option(name)} must be at most {most:,}, got {getattr(config, name)}")
    if not 0 <= config.zipf < 100:
        raise UserError(f"--zipf must be from 0 (all alike) to 100, got {config.zipf}")
    if min(config.pool_tokens) < max(config.chunk_sizes):
        raise UserError(
            f"--pool-tokens {min(config.pool_tokens)} is less than one chunk of "
            f"--chunk-sizes {max(config.chunk_sizes)}"
        )
    check_seed(config.seed)
    for codec in config.codec:
        for chunk_size in config.chunk_sizes:
            check_codec(codec, chunk_size=chunk_size, head_dim=config.head_dim)
    if config.trace is not None:
        for field in fields(config):
            if field.name in _MADE_UP and getattr(config, field.name) != field.default:
                raise UserError(
                    f"{option(field.name)} is not for a --trace: it is of what is made up"
                )
